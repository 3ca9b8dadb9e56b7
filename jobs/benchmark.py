"""Speed, measured: `python jobs/benchmark.py serve` prints what the README's table holds.

Each command measures this project and its point of comparison in one run on one machine, and
prints a table and one JSON line.
"""

import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from PIL import Image

from llava_ray.types import Prompt, Sampling

cli = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

WORDS = "what which how many is are the a of in on left right red blue cat dog near over".split()


@dataclass(frozen=True)
class Question:
    """One request of the load: a picture of coloured tiles and 6 to 40 words."""

    image: Image.Image
    text: str


@dataclass(frozen=True)
class Timing:
    """What one client saw of one answer, in seconds since it asked."""

    token_times_s: list[float]
    num_tokens: int
    total_s: float


@dataclass(frozen=True)
class Figures:
    """One row of the table."""

    system: str
    clients: int
    requests: int
    requests_per_s: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    itl_p50_ms: float
    latency_p50_s: float


Ask = Callable[[Question], AsyncIterator[int]]
"""Asks a question; yields the number of tokens so far, each time that some arrive."""


def make_question(seed: int, *, size: int) -> Question:
    rng = random.Random(seed)
    tiles = bytes(rng.randrange(256) for _ in range(8 * 8 * 3))
    image = Image.frombytes("RGB", (8, 8), tiles).resize((size, size), Image.Resampling.NEAREST)
    return Question(image, " ".join(rng.choices(WORDS, k=rng.randint(6, 40))))


async def time_answer(ask: Ask, question: Question) -> Timing:
    start = time.perf_counter()
    times: list[float] = []
    num_tokens = 0
    async for num_tokens in ask(question):
        times.append(time.perf_counter() - start)
    return Timing(times, num_tokens, time.perf_counter() - start)


async def measure(system: str, ask: Ask, *, clients: int, requests: int, size: int) -> Figures:
    """Keep `clients` requests in flight until `requests` are answered."""
    questions = iter([make_question(seed, size=size) for seed in range(requests)])
    timings: list[Timing] = []

    async def client() -> None:
        for question in questions:
            timings.append(await time_answer(ask, question))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    wall_s = time.perf_counter() - start
    first = sorted(timing.token_times_s[0] for timing in timings)
    gaps = [
        later - earlier
        for timing in timings
        for earlier, later in zip(timing.token_times_s, timing.token_times_s[1:], strict=False)
    ]
    return Figures(
        system=system,
        clients=clients,
        requests=requests,
        requests_per_s=round(requests / wall_s, 2),
        tokens_per_s=round(sum(timing.num_tokens for timing in timings) / wall_s, 1),
        ttft_p50_s=round(statistics.median(first), 3),
        ttft_p95_s=round(first[int(0.95 * (len(first) - 1))], 3),
        itl_p50_ms=round(1000 * statistics.median(gaps), 1) if gaps else 0.0,
        latency_p50_s=round(statistics.median(timing.total_s for timing in timings), 3),
    )


def ask_over_http(base_url: str, model: str, *, max_tokens: int) -> Ask:
    """Streamed chat completions, as an OpenAI client makes them."""
    import httpx

    from llava_ray.images import to_data_url

    client = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))

    async def ask(question: Question) -> AsyncIterator[int]:
        image = {"type": "image_url", "image_url": {"url": to_data_url(question.image)}}
        content = [image, {"type": "text", "text": question.text}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        url = f"{base_url}/v1/chat/completions"
        num_chunks = 0
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(event["error"]["message"])
                if event.get("usage"):
                    yield event["usage"]["completion_tokens"]
                elif event["choices"][0]["delta"].get("content"):
                    num_chunks += 1
                    yield num_chunks

    return ask


def ask_a_generate_each(path: Path, *, max_tokens: int, at_once: int = 5) -> Ask:
    """LLaVA's model worker without its HTTP: a thread and a `generate` for each request.

    At most `at_once` run together (`--limit-model-concurrency`, 5 in LLaVA); nothing is batched.
    Called in this process, it saves what HTTP costs, which is to its advantage.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    from llava_ray.model.core import load_model

    core = load_model(str(path), dtype="bfloat16")
    free = asyncio.Semaphore(at_once)

    class Arrivals(BaseStreamer):
        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.loop, self.queue = loop, asyncio.Queue()
            self.num_calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.num_calls += 1  # the first call brings the prompt
            self.loop.call_soon_threadsafe(self.queue.put_nowait, self.num_calls - 1)

        def end(self) -> None:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, None)

    def generate(question: Question, arrivals: Arrivals) -> None:
        text = f"USER: <image>\n{question.text} ASSISTANT:"
        inputs = core.encode(text, [question.image])
        with torch.inference_mode():
            core.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                streamer=arrivals,
            )

    async def ask(question: Question) -> AsyncIterator[int]:
        async with free:
            arrivals = Arrivals(asyncio.get_running_loop())
            running = asyncio.create_task(asyncio.to_thread(generate, question, arrivals))
            while (num_tokens := await arrivals.queue.get()) is not None:
                if num_tokens:
                    yield num_tokens
            await running

    return ask
