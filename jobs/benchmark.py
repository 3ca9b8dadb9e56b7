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
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from benchmark_data import benchmark_data
from benchmark_evaluate import benchmark_evaluate
from benchmark_train import benchmark_train
from PIL import Image

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
    itl_p50_ms: float  # between two arrivals of text
    tpot_p50_ms: float  # a token, once the first has come
    latency_p50_s: float


@dataclass(frozen=True)
class LoadFigures:
    """One row of the table of loading; medians over its runs, each in a process of its own."""

    system: str
    weights_mb: float
    load_s: float  # model, tokenizer and picture preprocessing, packages imported before
    peak_mb: float  # what the process grew by while loading
    peak_to_weights: float


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
    async for so_far in ask(question):
        num_tokens = so_far
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
        tpot_p50_ms=round(
            1000
            * statistics.median(
                (timing.total_s - timing.token_times_s[0]) / max(1, timing.num_tokens - 1)
                for timing in timings
            ),
            1,
        ),
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


def ask_a_generate_each(path: Path, *, dtype: str, max_tokens: int, at_once: int = 5) -> Ask:
    """LLaVA's model worker without its HTTP: a thread and a `generate` for each request.

    At most `at_once` run together (`--limit-model-concurrency`, 5 in LLaVA); nothing is batched.
    LLaVA's computes in float16. Called in this process, it saves what HTTP costs, which is to its
    advantage.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    from llava_ray.model.core import load_model

    core = load_model(str(path), dtype=dtype)
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


def serve_here(path: Path) -> str:
    """Start the Serve application with one model; return its address."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported
    import ray
    from ray import serve

    from llava_ray.app import build_app
    from llava_ray.config import ModelConfig, ServeConfig

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=40)
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    model = ModelConfig(path=str(path), name="benchmark", max_ongoing_requests=256)
    serve.run(build_app(ServeConfig(models=[model], page=False)))
    return "http://127.0.0.1:8123"


def print_table(rows: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    names = list(asdict(rows[0]))
    for name in names:
        table.add_column(name, justify="left" if name == "system" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in asdict(row).values()))
    Console(width=140).print(table)
    print(json.dumps([asdict(row) for row in rows]))


@cli.callback()
def commands() -> None:
    """Speed, measured."""


@cli.command("serve")
def benchmark_serve(
    model: Annotated[
        str, typer.Option(help="'103m' (random weights of that size) or the folder of a model.")
    ] = "103m",
    clients: Annotated[str, typer.Option(help="Numbers of clients at once.")] = "1,8,32",
    max_tokens: Annotated[int, typer.Option(help="New tokens of each answer.")] = 64,
    requests_each: Annotated[int, typer.Option(help="Requests for each client.")] = 2,
    image_size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 224,
    system: Annotated[
        Literal["both", "llava_ray", "generate"], typer.Option(help="What is measured.")
    ] = "both",
) -> None:
    """This app through HTTP, beside a thread and a `generate` a request as in LLaVA's worker."""
    import torch

    counts = [int(count) for count in clients.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(model)
        if model == "103m":
            from llava_ray.model.build import SHAPE_103M, build_random_model

            path = build_random_model(scratch, SHAPE_103M, dtype=torch.bfloat16)
        rows: list[Figures] = []

        async def run(name: str, ask: Ask) -> None:
            await measure(name, ask, clients=2, requests=2, size=image_size)  # warms up
            for count in counts:
                requests = max(4, count * requests_each)
                row = await measure(name, ask, clients=count, requests=requests, size=image_size)
                print(row, flush=True)
                rows.append(row)

        if system in ("both", "generate"):
            from llava_ray.model.precision import choose_dtype

            best = str(choose_dtype("cuda" if torch.cuda.is_available() else "cpu"))
            for dtype in ("float16", best.removeprefix("torch.")):
                ask = ask_a_generate_each(path, dtype=dtype, max_tokens=max_tokens)
                asyncio.run(run(f"generate each, {dtype}", ask))
        if system in ("both", "llava_ray"):
            url = serve_here(path)
            asyncio.run(run("llava_ray", ask_over_http(url, "benchmark", max_tokens=max_tokens)))
        print_table(rows)


LOADERS = {
    "llava_ray": """
from llava_ray.model.core import load_model
def load(path, dtype):
    return load_model(path, dtype=dtype, device="cpu")
""",
    "transformers": """
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration
def load(path, dtype):
    AutoTokenizer.from_pretrained(path)
    AutoImageProcessor.from_pretrained(path, backend="pil")
    return LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, device_map={"": "cpu"})
""",
}
MEASURE_LOAD = """
import sys, time
def read_kb(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
path, tiny, dtype = sys.argv[1:]
load(tiny, dtype)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before, start = read_kb("VmRSS"), time.perf_counter()
model = load(path, dtype)
seconds = time.perf_counter() - start
print(seconds, (read_kb("VmHWM") - before) * 1024)
"""
"""Linux only. `resource.getrusage` would not do: its peak includes that of the parent process."""


@cli.command("load")
def benchmark_load(
    model: Annotated[
        str, typer.Option(help="'103m' (random weights of that size) or the folder of a model.")
    ] = "103m",
    dtype: Annotated[str, typer.Option(help="Precision in memory.")] = "bfloat16",
    runs: Annotated[int, typer.Option(help="Loads by each system, in turns.")] = 5,
) -> None:
    """load_model beside transformers' `from_pretrained` of the same folder: time and peak memory.

    Each load is in a process of its own that has loaded a tiny model before, so that neither
    importing packages nor the system's first look at the file counts.
    """
    import torch

    from llava_ray.model.build import SHAPE_103M, build_random_model

    with tempfile.TemporaryDirectory() as scratch:
        tiny = build_random_model(Path(scratch) / "tiny")
        path = Path(model)
        if model == "103m":
            path = build_random_model(Path(scratch) / "model", SHAPE_103M, dtype=torch.bfloat16)
        num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
        for run in range(runs + 1):
            for name, loader in LOADERS.items():
                code = [sys.executable, "-W", "ignore", "-c", loader + MEASURE_LOAD]
                done = subprocess.run(
                    [*code, path, tiny, dtype], capture_output=True, text=True, check=True
                )
                seconds, grown = done.stdout.split()
                if run:  # the first is to bring the file into the system's cache
                    results[name].append((float(seconds), float(grown)))
        rows = [
            LoadFigures(
                system=name,
                weights_mb=round(num_bytes / 1e6, 1),
                load_s=round(statistics.median(seconds for seconds, _ in result), 3),
                peak_mb=round(statistics.median(grown for _, grown in result) / 1e6, 1),
                peak_to_weights=round(statistics.median(g for _, g in result) / num_bytes, 3),
            )
            for name, result in results.items()
        ]
        print_table(rows)


cli.command("data")(benchmark_data)
cli.command("evaluate")(benchmark_evaluate)
cli.command("train")(benchmark_train)

if __name__ == "__main__":
    cli()
