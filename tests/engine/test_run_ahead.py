"""Steps that are launched before the previous step's tokens are known: the answers are the same.

This is how the engine works on a GPU. Here the CPU computes each step when it is launched;
everything else is the same.
"""

import asyncio
import json

import pytest

from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.engine.torch_engine.execution.model_runner import ModelRunner
from llava_ray.engine.torch_engine.scheduling.scheduler import Scheduler, StepPlan
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.model.loading import load_model
from llava_ray.types import Chunk, Sampling
from tests.support.engine_requests import (
    ScriptedRunner,
    answer,
    ask_late,
    load,
    make_sequence,
    mixed_prompts,
    prompt,
    read,
)
from tests.support.tiny_checkpoint import make_image, tiny_model


def load_ahead(*, graphs: bool = False, **options) -> TorchEngine:
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    size = options.setdefault("max_batch_size", 9)
    runner = ModelRunner(core, cache_tokens=16384, max_batch_size=size, uses_graphs=graphs)
    return TorchEngine(core, runner=runner, runs_ahead=True, **options)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("prefill_tokens", [7, 4096])
def test_requests_that_come_and_go_get_the_answers_of_generate(generate, graphs, prefill_tokens):
    prompts = mixed_prompts(16)

    async def main():
        engine = load_ahead(graphs=graphs, prefill_tokens=prefill_tokens)
        answers = await ask_late(engine, prompts)
        for i, (got, each) in enumerate(zip(answers, prompts, strict=True)):
            want = generate(each)
            assert want.startswith(got) if i % 5 == 2 else got == want
        while engine.stats()["num_running"]:  # a step that came too late for what has ended
            await engine.check()
        assert engine.stats()["cache_tokens_used"] == 0
        await engine.close()

    asyncio.run(main())


SCHEMA = json.dumps({"enum": ["yes", "perhaps", "no"]})
ASKED = [
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.9, "seed": 4, "top_k": 5, "top_p": 0.9, "num_logprobs": 2},
    {"repetition_penalty": 1.3, "max_tokens": 9},
    {"num_logprobs": 3},
    {"stop": ("e",), "ignore_eos": True, "max_tokens": 60},
    {"json_schema": SCHEMA},
    {"min_tokens": 7, "num_logprobs": 0},
    {"presence_penalty": 1.0, "temperature": 1.2, "seed": 9},
    {"max_tokens": 1},
    {},
]


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_whatever_is_asked_for_comes_out_as_step_by_step(batch):
    prompts = [
        prompt(f"a <image> {i}", make_image(i % 3), **asked) for i, asked in enumerate(ASKED)
    ]

    async def main(engine: TorchEngine) -> list[list[Chunk]]:
        answers: list[list[Chunk]] = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            answers += await asyncio.gather(*[read(engine, each) for each in some])
        await engine.close()
        return answers

    def strip(answers: list[list[Chunk]]) -> list[list[tuple]]:
        """How much was in the cache depends on who came first; logprobs on the batch, a little."""
        return [
            [
                (*chunk[:4], [(token.data, len(token.top)) for token in chunk.logprobs])
                for chunk in chunks
            ]
            for chunks in answers
        ]

    assert strip(asyncio.run(main(load_ahead(max_batch_size=10)))) == strip(
        asyncio.run(main(load(max_batch_size=10)))
    )


class Spy(ScriptedRunner):
    """Notes in which order steps are launched and read."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def launch(self, plan: StepPlan) -> "Reading":
        self.plans.append(plan)
        number = len(self.plans)
        self.events.append(f"launch {number}")
        tokens = [
            7 + len(scheduled.sequence.token_ids) + scheduled.sequence.num_expected
            for scheduled in plan.complete
        ]
        return Reading(self, number, tokens)


class Reading:
    def __init__(self, spy: Spy, number: int, tokens: list[int]) -> None:
        self.spy, self.number, self.tokens = spy, number, tokens

    def read(self) -> list[int]:
        self.spy.events.append(f"read {self.number}")
        return self.tokens


def follow(**sampling) -> list[str]:
    async def main() -> list[str]:
        spy = Spy()
        engine = load(runner=spy, runs_ahead=True)
        await answer(engine, prompt(**sampling))
        while engine.stats()["num_running"]:
            await engine.check()
        await engine.close()
        return spy.events

    return asyncio.run(main())


def test_the_next_step_is_launched_before_the_tokens_of_the_last_are_read():
    assert follow(max_tokens=3) == [
        "launch 1",
        "launch 2",
        "read 1",
        "launch 3",
        "read 2",
        "read 3",
    ], "and none for a token beyond max_tokens"


def test_where_the_next_logits_depend_on_the_last_token_it_is_waited_for():
    events = follow(max_tokens=2, repetition_penalty=1.5)
    assert events == ["launch 1", "read 1", "launch 2", "read 2"]


def launch(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    scheduler.advance(plan)
    return plan


def sequences_of(plan: StepPlan) -> set[Sequence]:
    return {scheduled.sequence for scheduled in plan.scheduled}


def test_an_answer_that_ends_while_its_next_step_is_computed_keeps_its_memory_until_then():
    scheduler = Scheduler(cache_tokens=256, max_batch_size=4, prefill_tokens=64, prefix_cache=False)
    ending = make_sequence(Sampling(temperature=0, stop_token_ids=(9,)), max_tokens=20)
    other = make_sequence(max_tokens=20)
    for sequence in (ending, other):
        scheduler.add(sequence)
    first, second = launch(scheduler), launch(scheduler)
    assert sequences_of(first) == sequences_of(second) == {ending, other}
    before = scheduler.kv_allocator.num_used
    news = dict(scheduler.commit(first, [9, 7]))
    assert (news[ending].finish_reason, news[other].finish_reason) == ("stop", None)
    assert scheduler.kv_allocator.num_used == before, "the second step still writes there"
    third = launch(scheduler)
    assert sequences_of(third) == {other}
    assert [sequence for sequence, _ in scheduler.commit(second, [8, 8])] == [other]
    assert scheduler.kv_allocator.num_used < before
    assert (ending.token_ids, scheduler.running) == ([9], [other])


def test_what_is_aborted_in_two_steps_leaves_after_the_second():
    scheduler = Scheduler(cache_tokens=256, max_batch_size=4, prefill_tokens=64, prefix_cache=False)
    gone = make_sequence(max_tokens=20)
    scheduler.add(gone)
    first, second = launch(scheduler), launch(scheduler)
    scheduler.abort(gone)
    assert launch(scheduler).scheduled == []
    assert scheduler.commit(first, [7]) == []
    assert scheduler.kv_allocator.num_used > 0
    assert scheduler.commit(second, [7]) == []
    assert (scheduler.kv_allocator.num_used, scheduler.has_work()) == (0, False)
