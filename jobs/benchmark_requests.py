"""The load of the serving benchmark: images and questions, clients, and what they measure."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from PIL import Image

WORDS = "what which how many is are the a of in on left right red blue cat dog near over".split()


@dataclass(frozen=True)
class Load:
    """The load for every system.

    Attributes:
        model: folder of the model.
        clients: numbers of simultaneous clients, measured one after the other.
        requests_each: number of requests of each client.
        max_tokens: exact length of each answer.
        image_size: side of the images, in pixels.
        dtype: dtype of every system; empty: the application's default on this machine.
        quantization: quantization of the application and its engine.
    """

    model: str
    clients: tuple[int, ...]
    requests_each: int
    max_tokens: int
    image_size: int
    dtype: str = ""
    quantization: str = "none"

    def name_dtype(self) -> str:
        """Return the dtype that all systems compute in."""
        import torch

        from llava_ray.model.precision import choose_dtype

        chosen = choose_dtype("cuda" if torch.cuda.is_available() else "cpu")
        return self.dtype or str(chosen).removeprefix("torch.")

    def count_requests(self, clients: int) -> int:
        return max(4, clients * self.requests_each)


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One request: an image of coloured tiles and 6 to 40 words."""

    image: Image.Image
    text: str


@dataclass(frozen=True)
class Timing:
    """One answer as its client saw it; in seconds since it sent the request."""

    token_times_s: list[float]
    num_tokens: int
    total_s: float


@dataclass(frozen=True)
class ServingFigures:
    """One row of the table."""

    system: str
    clients: int
    requests: int
    requests_per_s: float
    tokens_per_s: float
    ttft_p50_s: float = 0.0
    ttft_p95_s: float = 0.0
    itl_p50_ms: float = 0.0  # between two chunks of text
    itl_p95_ms: float = 0.0
    tpot_p50_ms: float = 0.0  # per token after the first
    latency_p50_s: float = 0.0
    peak_mb: float = 0.0  # of all its processes; shared memory is counted once


Ask = Callable[[BenchmarkQuestion], AsyncIterator[int]]
"""Sends a question; yields the number of tokens so far, whenever some arrive."""


def make_question(seed: int, *, size: int) -> BenchmarkQuestion:
    rng = random.Random(seed)
    tiles = bytes(rng.randrange(256) for _ in range(8 * 8 * 3))
    image = Image.frombytes("RGB", (8, 8), tiles).resize((size, size), Image.Resampling.NEAREST)
    return BenchmarkQuestion(image, " ".join(rng.choices(WORDS, k=rng.randint(6, 40))))


async def time_answer(ask: Ask, question: BenchmarkQuestion) -> Timing:
    start = time.perf_counter()
    times: list[float] = []
    num_tokens = 0
    async for so_far in ask(question):
        num_tokens = so_far
        times.append(time.perf_counter() - start)
    return Timing(times, num_tokens, time.perf_counter() - start)


async def measure(
    system: str, ask: Ask, questions: Sequence[BenchmarkQuestion], *, clients: int
) -> ServingFigures:
    """Keep `clients` requests in flight until all questions are answered."""
    left = iter(questions)
    timings: list[Timing] = []

    async def client() -> None:
        for question in left:
            timings.append(await time_answer(ask, question))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    wall_s = time.perf_counter() - start
    first = sorted(timing.token_times_s[0] for timing in timings)
    gaps = sorted(
        later - earlier
        for timing in timings
        for earlier, later in zip(timing.token_times_s, timing.token_times_s[1:], strict=False)
    )
    tpots = [
        (timing.total_s - timing.token_times_s[0]) / max(1, timing.num_tokens - 1)
        for timing in timings
    ]
    return ServingFigures(
        system=system,
        clients=clients,
        requests=len(questions),
        requests_per_s=round(len(questions) / wall_s, 2),
        tokens_per_s=round(sum(timing.num_tokens for timing in timings) / wall_s, 1),
        ttft_p50_s=round(statistics.median(first), 3),
        ttft_p95_s=round(first[int(0.95 * (len(first) - 1))], 3),
        itl_p50_ms=round(1000 * statistics.median(gaps), 1) if gaps else 0.0,
        itl_p95_ms=round(1000 * gaps[int(0.95 * (len(gaps) - 1))], 1) if gaps else 0.0,
        tpot_p50_ms=round(1000 * statistics.median(tpots), 1),
        latency_p50_s=round(statistics.median(timing.total_s for timing in timings), 3),
    )
