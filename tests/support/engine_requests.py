"""Engines over the tiny checkpoint, prompts for them, and readers of their streams."""

import asyncio
import random
import time
from contextlib import aclosing

from llava_ray.engine.detokenizer import Detokenizer
from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.engine.torch_engine.scheduling.scheduler import StepPlan
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.model.loading import load_model
from llava_ray.types import Chunk, Prompt, Sampling
from tests.support.tiny_checkpoint import make_image, tiny_model

GREEDY = Sampling(temperature=0)


def load(**options) -> TorchEngine:
    return TorchEngine(load_model(tiny_model(), dtype="float32", device="cpu"), **options)


def prompt(text="hello", *images, **sampling) -> Prompt:
    return Prompt("test", text, images, Sampling(**{"temperature": 0, "max_tokens": 24} | sampling))


async def read(engine, prompt: Prompt) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(prompt)]


async def answer(engine, prompt: Prompt) -> str:
    return "".join(chunk.text for chunk in await read(engine, prompt))


async def read_some(engine, prompt: Prompt, count: int) -> str:
    """Read `count` chunks, then close the stream; return their text."""
    text = ""
    async with aclosing(engine.stream(prompt)) as chunks:
        async for chunk in chunks:
            text += chunk.text
            count -= 1
            if count == 0:
                break
    return text


async def ask_late(engine, prompts: list[Prompt]) -> list[str]:
    """Submit each prompt one step after the previous one; close every fifth stream early."""

    async def late(i: int) -> str:
        for _ in range(i):
            await engine.check()
        if i % 5 == 2:
            return await read_some(engine, prompts[i], 2)
        return await answer(engine, prompts[i])

    return await asyncio.gather(*[late(i) for i in range(len(prompts))])


def mixed_prompts(count: int) -> list[Prompt]:
    """Return prompts of many lengths, with zero to three images each."""
    rng = random.Random(5)
    prompts = []
    for i in range(count):
        images = [make_image(10 * i + j) for j in range(i % 4)]
        words = " ".join(rng.choice(["red", "a", "where", "big", "dög"]) for _ in range(3 + 7 * i))
        text = f"USER: {'<image> ' * len(images)}{words} ASSISTANT:"
        prompts.append(prompt(text, *images, max_tokens=rng.randint(5, 40)))
    return prompts


class ScriptedRunner:
    """Generates 7, 8, 9, ... for every sequence, records the plans, and fails on demand."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.breaks_at: int | None = None
        self.delay_s = 0.0

    def run(self, plan: StepPlan) -> list[int]:
        self.plans.append(plan)
        time.sleep(self.delay_s)
        if self.breaks_at is not None and len(self.plans) >= self.breaks_at:
            raise RuntimeError("out of luck")
        return [7 + len(scheduled.sequence.token_ids) for scheduled in plan.complete]

    def check(self) -> None:
        if self.breaks_at == 0:
            raise RuntimeError("out of luck")

    def close(self) -> None:
        pass


def make_sequence(sampling: Sampling = GREEDY, *, length: int = 4, max_tokens: int = 3) -> Sequence:
    text = Detokenizer(lambda ids: "".join(f"{i} " for i in ids))
    return Sequence("test", [1] * length, 0, sampling, max_tokens, text)
