"""Any sampling settings give an answer or an error for that request; other requests go on."""

import asyncio
import json
import random
from typing import Any

import pytest
import torch

from llava_ray.engine.torch_engine.execution.sampler import sample
from llava_ray.engine.torch_engine.scheduling.scheduler import Scheduler
from llava_ray.errors import EngineError, LlavaRayError
from llava_ray.types import Chunk
from tests.support.engine_requests import answer, load, make_sequence, prompt, read
from tests.support.tiny_checkpoint import make_image

TINY, HUGE = 5e-324, 1.7e308
CHOICES: dict[str, list[Any]] = {
    "temperature": [0.0, TINY, 1e-5, 1.0, 2.0, HUGE],
    "top_p": [TINY, 1e-30, 0.5, 1.0],
    "top_k": [0, 1, 2**31],
    "min_p": [0.0, TINY, 1.0],
    "repetition_penalty": [TINY, 1e-30, 0.01, 1.0, 100.0, HUGE],
    "presence_penalty": [-2.0, 0.0, 2.0],
    "frequency_penalty": [-2.0, 0.0, 2.0],
    "min_tokens": [0, 5, 2**31],
    "stop": [(), ("a",), ("\x00", "")],
    "stop_token_ids": [(), tuple(range(3000)), (2**40,)],
    "logit_bias": [(), tuple((i, -100.0) for i in range(300)), ((5, 100.0), (6, -100.0))],
    "ignore_eos": [False, True],
    "seed": [None, 0, -(2**63)],
    "num_logprobs": [None, 0, 20],
    "json_schema": [None, json.dumps({"enum": ["yes", "no"]}), json.dumps({"type": "object"})],
}


def draw_sampling(rng: random.Random) -> dict[str, Any]:
    names = rng.sample(list(CHOICES), rng.randint(2, len(CHOICES)))
    return {name: rng.choice(CHOICES[name]) for name in names}


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_any_sampling_is_answered_or_refused_and_others_see_nothing(runs_ahead: bool) -> None:
    rng = random.Random(7)
    hostile = [draw_sampling(rng) for _ in range(120)]

    async def main() -> None:
        engine = load(cache_tokens=8192, runs_ahead=runs_ahead)
        honest = [prompt("what is this <image>", make_image(i), max_tokens=40) for i in range(3)]
        alone = [await answer(engine, each) for each in honest]
        asked = [read(engine, prompt("red", max_tokens=12, **sampling)) for sampling in hostile]
        outcomes, beside = await asyncio.gather(
            asyncio.gather(*asked, return_exceptions=True),
            asyncio.gather(*[answer(engine, each) for each in honest]),
        )
        await engine.check()
        await engine.close()
        assert beside == alone
        for sampling, outcome in zip(hostile, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, LlavaRayError), sampling
            else:
                assert outcome[-1].finish_reason in ("stop", "length"), sampling

    asyncio.run(main())


def test_a_format_holds_where_min_tokens_and_stop_tokens_leave_nothing_to_choose() -> None:
    async def main() -> None:
        engine = load()
        everything = {"min_tokens": 20, "stop_token_ids": tuple(range(3000)), "max_tokens": 20}
        for temperature in (0.0, 1.0):
            chunks = await read(
                engine,
                prompt("a", json_schema='{"enum": ["yes"]}', temperature=temperature, **everything),
            )
            assert '"yes"'.startswith("".join(chunk.text for chunk in chunks))
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_sequence_whose_logits_are_no_numbers_fails_alone(
    value: float, temperature: float
) -> None:
    scheduler = Scheduler(cache_tokens=4096, max_batch_size=4, prefill_tokens=100)
    broken, whole = (make_sequence(prompt("", temperature=temperature).sampling) for _ in range(2))
    scheduler.add(broken)
    scheduler.add(whole)
    plan = scheduler.plan()
    logits_BV = torch.randn(2, 50)
    logits_BV[0] = value
    tokens = sample(logits_BV, [each.sequence for each in plan.complete]).read()
    assert all(0 <= token < 50 for token in tokens)
    scheduler.advance(plan)
    news = dict(scheduler.commit(plan, tokens))
    assert isinstance(news[broken], EngineError)
    assert isinstance(news[whole], Chunk)
    assert list(scheduler.running) == [whole]


def test_a_sequence_that_cannot_take_its_token_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = Scheduler(cache_tokens=4096, max_batch_size=4, prefill_tokens=100)
    broken, whole = make_sequence(), make_sequence()

    def fail(token_id: int) -> Chunk:
        raise ValueError("no such token")

    monkeypatch.setattr(broken, "append", fail)
    scheduler.add(broken)
    scheduler.add(whole)
    plan = scheduler.plan()
    scheduler.advance(plan)
    news = dict(scheduler.commit(plan, [7, 7]))
    assert isinstance(news[broken], EngineError)
    assert "no such token" in news[broken].message
    assert isinstance(news[whole], Chunk)
