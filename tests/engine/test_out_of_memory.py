"""A GPU without memory for a step or a model; stand-ins raise what torch raises."""

import asyncio
import re

import pytest
import torch

from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.engine.torch_engine.execution import kv_cache
from llava_ray.engine.torch_engine.execution.model_runner import ModelRunner
from llava_ray.engine.torch_engine.scheduling.scheduler import Scheduler
from llava_ray.errors import ConfigError, EngineError
from llava_ray.model import loading
from llava_ray.model.loading import load_model
from tests.support.engine_requests import answer, make_sequence, prompt
from tests.support.tiny_checkpoint import tiny_model

SHORTAGE = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.05 GiB of "
    "which 1.31 GiB is free. Including non-PyTorch memory, this process has 20.73 GiB in use."
)
TOLD = r"2\.00 GiB more were needed, and GPU 0 had 1\.31 GiB of its 22\.05 GiB free"


class TightRunner(ModelRunner):
    """Has no memory for steps of more than `most` tokens."""

    most = 1_000_000

    def _choose_tokens(self, plan):
        if sum(scheduled.num_tokens for scheduled in plan.scheduled) > self.most:
            raise SHORTAGE
        return super()._choose_tokens(plan)


def load_tight(*, runs_ahead: bool) -> tuple[TorchEngine, TightRunner]:
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    runner = TightRunner(core, cache_tokens=16384)
    return TorchEngine(core, runner=runner, runs_ahead=runs_ahead, prefix_cache=False), runner


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_prompt_without_memory_fails_alone_and_the_others_get_their_answers(
    generate, runs_ahead, monkeypatch
):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))

    async def main():
        engine, runner = load_tight(runs_ahead=runs_ahead)
        runner.most = 100
        long = prompt("word " * 150)
        running = asyncio.create_task(answer(engine, prompt("one", max_tokens=60)))
        while not engine.stats()["num_new_tokens"]:
            await engine.check()
        with pytest.raises(EngineError, match=TOLD) as told:
            await answer(engine, long)
        assert re.search("cache_tokens or max_batch_size", told.value.message)
        assert await running == generate(prompt("one", max_tokens=60))
        runner.most = 1_000_000
        assert await answer(engine, long) == generate(long)
        assert engine.stats()["cache_tokens_used"] == 0
        await engine.close()

    asyncio.run(main())
    assert emptied


def test_without_a_prompt_the_latest_stream_makes_room_for_the_others():
    scheduler = Scheduler(cache_tokens=1024, max_batch_size=8, prefill_tokens=100)
    early, late = make_sequence(), make_sequence()
    for sequence in (early, late):
        scheduler.add(sequence)
    plan = scheduler.plan()
    scheduler.advance(plan)
    scheduler.commit(plan, [7, 7])
    ((failed, error),) = scheduler.take_back(scheduler.plan(), "no memory")
    assert failed is late
    assert error.message == "no memory"
    again = scheduler.plan()
    assert [each.sequence for each in again.scheduled] == [early]


def test_what_failed_while_an_earlier_step_runs_frees_its_memory_after_that_step():
    scheduler = Scheduler(cache_tokens=1024, max_batch_size=8, prefill_tokens=2)
    scheduler.add(make_sequence(length=6))
    first = scheduler.plan()
    scheduler.advance(first)
    assert len(scheduler.take_back(scheduler.plan(), "no memory")) == 1
    assert scheduler.kv_allocator.num_used
    scheduler.commit(first, [])
    assert not scheduler.running
    scheduler.add(other := make_sequence(length=6))
    assert scheduler.plan().scheduled[0].sequence is other


def test_weights_without_memory_are_not_called_broken(monkeypatch):
    opened = loading.open_checkpoint(tiny_model())

    def refuse(*_, **__):
        raise SHORTAGE

    monkeypatch.setattr(opened.architecture.model_class, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=TOLD) as told:
        load_model(tiny_model(), device="cpu")
    assert "fetch them again" not in told.value.message
    assert "do not fit" in told.value.message


def test_a_cache_without_memory_names_its_setting(monkeypatch):
    def refuse(*_, **__):
        raise SHORTAGE

    monkeypatch.setattr(kv_cache, "_zeros", refuse)
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match=TOLD + r".*cache_tokens \(100032\)"):
        TorchEngine(core, cache_tokens=100_000)
