"""Speed of serving, measured: what `python jobs/benchmark.py serve` runs.

The same weights and requests (a picture and a few words, greedy, answers of one length) through
this application, its engine alone, vLLM's own server, one static batch, and LLaVA's way of a thread
and a `generate` a request. Each system runs in a process of its own that also makes the load.
Beside them stands what the machine could do at most, by its measured rates.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_data import watch_memory
from PIL import Image

WORDS = "what which how many is are the a of in on left right red blue cat dog near over".split()
SYSTEMS = {
    "limit": "what the machine could do",
    "llava_ray": "this application, through HTTP",
    "engine": "its engine alone, called in one process",
    "vllm": "vLLM's server; LLAVA_RAY_VLLM_PYTHON names its Python",
    "batch": "transformers' `generate` of all requests in one batch",
    "generate": "a thread and a `generate` a request, as LLaVA's worker does it",
    "generate-float16": "the same in LLaVA's own precision",
}
"""What can be measured."""

NUM_PICTURED_ALIKE = 8
"""Clients that ask about one picture in the last row of this application."""


@dataclass(frozen=True)
class Load:
    """What every system is asked.

    Attributes:
        model: its folder.
        clients: how many ask at once, in turns.
        requests_each: of each client.
        max_tokens: of each answer, which is exactly so long.
        image_size: side of the pictures, in pixels.
    """

    model: str
    clients: tuple[int, ...]
    requests_each: int
    max_tokens: int
    image_size: int

    def count_requests(self, clients: int) -> int:
        return max(4, clients * self.requests_each)


@dataclass(frozen=True)
class Question:
    """One request: a picture of coloured tiles and 6 to 40 words."""

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
    ttft_p50_s: float = 0.0
    ttft_p95_s: float = 0.0
    itl_p50_ms: float = 0.0  # between two arrivals of text
    itl_p95_ms: float = 0.0
    tpot_p50_ms: float = 0.0  # a token, once the first has come
    latency_p50_s: float = 0.0
    peak_mb: float = 0.0  # of all its processes, what they share counted once


Ask = Callable[[Question], AsyncIterator[int]]
"""Asks a question; yields the number of tokens so far, each time that some arrive."""


def benchmark_serve(
    model: Annotated[
        str, typer.Option(help="'103m' (random weights of that size) or the folder of a model.")
    ] = "103m",
    clients: Annotated[str, typer.Option(help="Numbers of clients at once.")] = "1,8,32",
    max_tokens: Annotated[int, typer.Option(help="New tokens of each answer.")] = 64,
    requests_each: Annotated[int, typer.Option(help="Requests for each client.")] = 1,
    image_size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 224,
    systems: Annotated[str, typer.Option(help=f"Which of {', '.join(SYSTEMS)}.")] = "",
    plot: Annotated[Path | None, typer.Option(help="PNG of tokens/s by clients.")] = None,
) -> None:
    """This application beside vLLM's server, `generate`, and what the machine could do."""
    from benchmark import print_table

    names = [name for name in systems.split(",") if name] or list(SYSTEMS)
    if unknown := set(names) - set(SYSTEMS):
        raise typer.BadParameter(f"there is no system {unknown}: choose among {', '.join(SYSTEMS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = alone(build_model, scratch) if model == "103m" else model
        counts = tuple(int(count) for count in clients.split(","))
        load = Load(folder, counts, requests_each, max_tokens, image_size)
        rows: list[Figures] = []
        for name in names:
            if name == "vllm" and "LLAVA_RAY_VLLM_PYTHON" not in os.environ:
                print("vllm is left out: LLAVA_RAY_VLLM_PYTHON names no Python", flush=True)
                continue
            rows += alone(compute_limit if name == "limit" else measure_system, name, load)
        print_table(rows)
    if plot:
        draw(rows, plot)


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def build_model(folder: str) -> str:
    """Write a model of 103 million random weights; return its folder, which vLLM reads too."""
    import torch

    from llava_ray.model.build import SHAPE_103M, build_random_model
    from llava_ray.model.export import export_model

    path = build_random_model(Path(folder) / "built", SHAPE_103M, dtype=torch.bfloat16)
    return str(export_model(str(path), Path(folder) / "model", to="hf"))


def measure_system(name: str, load: Load) -> list[Figures]:
    """Start a system, ask it, end it; return a row for each number of clients."""
    if name == "batch":
        return [measure_batch(load, count) for count in load.clients]
    rows = []
    with watch_memory() as peak, OPENERS[name](load) as ask, asyncio.Runner() as runner:
        warm = [make_question(-1 - seed, size=load.image_size) for seed in range(2)]
        runner.run(measure(name, ask, warm, clients=2))
        for count in load.clients:
            seeds = range(load.count_requests(count))
            questions = [make_question(100 * count + s, size=load.image_size) for s in seeds]
            rows.append(runner.run(measure(name, ask, questions, clients=count)))
            print(rows[-1], flush=True)
        if name == "llava_ray":
            alike = make_question(9, size=load.image_size)
            seeds = range(load.count_requests(NUM_PICTURED_ALIKE))
            questions = [replace(make_question(9000 + s, size=1), image=alike.image) for s in seeds]
            told = f"{name}, one picture"
            rows.append(runner.run(measure(told, ask, questions, clients=NUM_PICTURED_ALIKE)))
            print(rows[-1], flush=True)
    return [replace(row, peak_mb=round(peak[0] / 1e6)) for row in rows]


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


async def measure(system: str, ask: Ask, questions: Sequence[Question], *, clients: int) -> Figures:
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
    return Figures(
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


@contextlib.contextmanager
def open_llava_ray(load: Load) -> Iterator[Ask]:
    """The whole application, as `llava-ray serve` starts it."""
    port = find_port()
    command = [sys.executable, "-m", "llava_ray.cli", "serve", load.model, "--no-page"]
    environment = {"RAY_AUTH_MODE": "disabled"}
    url = f"http://127.0.0.1:{port}"
    with run_server([*command, "--port", str(port)], f"{url}/readyz", environment):
        yield ask_over_http(url, max_tokens=load.max_tokens)


@contextlib.contextmanager
def open_vllm(load: Load) -> Iterator[Ask]:
    """vLLM's own server, in its own environment."""
    port = find_port()
    command = [os.environ["LLAVA_RAY_VLLM_PYTHON"], "-m", "vllm.entrypoints.cli.main", "serve"]
    options = ["--max-model-len", "2048", "--port", str(port), "--dtype", name_dtype()]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    url = f"http://127.0.0.1:{port}"
    with run_server([*command, load.model, *options], f"{url}/health", environment):
        yield ask_over_http(url, max_tokens=load.max_tokens)


@contextlib.contextmanager
def run_server(command: Sequence[str], url: str, environment: dict[str, str]) -> Iterator[None]:
    """Run a server until the block ends, which begins once the address answers with 200."""
    import httpx

    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        try:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(url).status_code == 200:
                        break
                if server.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode()[-2000:])
                time.sleep(0.5)
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def find_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def name_dtype() -> str:
    """The precision that this application chooses on this machine."""
    import torch

    from llava_ray.model.precision import choose_dtype

    return str(choose_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch.")


def ask_over_http(base_url: str, *, max_tokens: int) -> Ask:
    """Streamed chat completions, as an OpenAI client makes them."""
    import httpx

    from llava_ray.images import to_data_url

    model = httpx.get(f"{base_url}/v1/models").json()["data"][0]["id"]
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


@contextlib.contextmanager
def open_engine(load: Load) -> Iterator[Ask]:
    """The engine of a replica, without HTTP, gateway and Serve; prompts as the application's."""
    from llava_ray.config import ModelConfig
    from llava_ray.engine.load import load_engine
    from llava_ray.types import ImagePart, Message, Prompt, Sampling, TextPart

    engine = load_engine(ModelConfig(path=load.model))
    sampling = Sampling(temperature=0, max_tokens=load.max_tokens, ignore_eos=True)

    async def ask(question: Question) -> AsyncIterator[int]:
        said = Message("user", (ImagePart(b""), TextPart(question.text)))
        text = engine.template.render([said])
        name = f"{random.getrandbits(64):x}"
        async for chunk in engine.stream(Prompt(name, text, (question.image,), sampling)):
            yield chunk.num_tokens

    try:
        yield ask
    finally:
        asyncio.run(engine.close())


@contextlib.contextmanager
def open_generate(load: Load, dtype: str = "") -> Iterator[Ask]:
    """LLaVA's model worker without its HTTP: a thread and a `generate` for each request."""
    yield ask_a_generate_each(load.model, dtype=dtype or name_dtype(), max_tokens=load.max_tokens)


OPENERS: dict[str, Callable[[Load], contextlib.AbstractContextManager[Ask]]] = {
    "llava_ray": open_llava_ray,
    "engine": open_engine,
    "vllm": open_vllm,
    "generate": open_generate,
    "generate-float16": lambda load: open_generate(load, "float16"),
}


def ask_a_generate_each(path: str, *, dtype: str, max_tokens: int, at_once: int = 5) -> Ask:
    """Ask as LLaVA's model worker does.

    At most `at_once` run together (`--limit-model-concurrency`, 5 in LLaVA); nothing is batched.
    LLaVA's computes in float16. Called in this process, it saves what HTTP costs, which is to its
    advantage.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    from llava_ray.model.core import load_model

    core = load_model(path, dtype=dtype)
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
        inputs = core.encode(render(core, question), [question.image])
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


def render(core: Any, question: Question) -> str:
    """The prompt that the application makes of a question."""
    from llava_ray.types import ImagePart, Message, TextPart

    return core.template.render([Message("user", (ImagePart(b""), TextPart(question.text)))])


def measure_batch(load: Load, clients: int) -> Figures:
    """One `generate` of as many requests as there are clients: nobody joins, nobody streams."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from llava_ray.model.core import load_model

    with watch_memory() as peak:
        core = load_model(load.model, dtype=name_dtype())
        questions = [make_question(100 * clients + s, size=load.image_size) for s in range(clients)]
        inputs = [core.encode(render(core, each), [each.image]) for each in questions]
        ids, masks = (
            pad_sequence([each[name][0].flip(0) for each in inputs], batch_first=True).flip(1)
            for name in ("input_ids", "attention_mask")
        )
        pixels = torch.cat([each["pixel_values"] for each in inputs]).to(core.model.dtype)

        def generate(num_tokens: int) -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                core.model.generate(
                    input_ids=ids,
                    attention_mask=masks,
                    pixel_values=pixels,
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    do_sample=False,
                )
            return time.perf_counter() - start

        generate(2)  # warms up
        wall_s = generate(load.max_tokens)
    row = Figures(
        "batch",
        clients,
        clients,
        round(clients / wall_s, 2),
        round(clients * load.max_tokens / wall_s, 1),
        latency_p50_s=round(wall_s, 3),
        peak_mb=round(peak[0] / 1e6),
    )
    print(row, flush=True)
    return row


def compute_limit(name: str, load: Load) -> list[Figures]:
    """Return what the machine could do if it only multiplied matrices and read memory.

    Of each request every weight of tower, projector and language model is multiplied once a token
    (one for a product and one for a sum), attention included, at the fastest rate that one large
    product of this model reached. In each step of all clients the weights are read once, in 16
    bits, and the keys and values of each, in 32 (on CPUs the cache has no other form).
    """
    from llava_ray.model.core import load_model

    core = load_model(load.model, dtype=name_dtype())
    flop_per_s, byte_per_s = measure_rates(core)
    text = core.model.config.text_config
    inner = core.model.model
    head = core.model.lm_head.weight.numel()
    tower, projector, language = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (inner.vision_tower, inner.multi_modal_projector, inner.language_model.layers)
    )
    questions = [make_question(s, size=load.image_size) for s in range(16)]
    encoded = [core.encode(render(core, each), [each.image])["input_ids"][0] for each in questions]
    num_prompt = statistics.mean(len(ids) for ids in encoded)
    num_image = statistics.mean(int((ids == core.image_token_id).sum()) for ids in encoded)
    width, depth = text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    kv_bytes = 2 * 4 * depth * width * (text.num_key_value_heads or heads) // heads
    prefill_flop = 2 * (num_image * (tower + projector) + num_prompt * language + head)
    prefill_flop += 2 * depth * width * num_prompt**2
    num_seen = num_prompt + load.max_tokens / 2
    decode_flop = 2 * (language + head) + 4 * depth * width * num_seen
    rows = []
    for clients in load.clients:
        computing_s = clients * (prefill_flop + load.max_tokens * decode_flop) / flop_per_s
        read = 2 * (language + head) + clients * kv_bytes * num_seen
        reading_s = load.max_tokens * read / byte_per_s
        prefill_s = clients * prefill_flop / flop_per_s
        wall_s = max(computing_s, prefill_s + reading_s)
        rate = clients * load.max_tokens / wall_s
        rows.append(Figures(name, clients, clients, round(clients / wall_s, 2), round(rate, 1)))
    print(f"{flop_per_s / 1e9:.0f} GFLOP/s, {byte_per_s / 1e9:.1f} GB/s", flush=True)
    return rows


def measure_rates(core: Any) -> tuple[float, float]:
    """Return the machine's FLOP/s in products of this model, and the bytes/s that it reads."""
    import torch

    from llava_ray.model.pack import pack_linears

    linear = core.model.model.language_model.layers[0].mlp.gate_proj
    layer, weight = torch.nn.Sequential(linear), linear.weight.detach()
    states = torch.randn(512, weight.shape[1], dtype=weight.dtype)
    flop = 2 * len(states) * weight.numel()
    plain_s = time_best(lambda: torch.nn.functional.linear(states, weight))
    pack_linears(layer)
    with torch.inference_mode():
        packed_s = time_best(lambda: layer(states))
    numbers = torch.ones(100_000_000)
    return flop / min(plain_s, packed_s), 4 * len(numbers) / time_best(lambda: numbers.sum())


def time_best(run: Callable[[], Any]) -> float:
    def time_once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(time_once() for _ in range(20))


def draw(rows: Sequence[Figures], path: Path) -> None:
    """Draw tokens/s over clients, a line a system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for system in dict.fromkeys(row.system for row in rows):
        mine = [row for row in rows if row.system == system]
        style = "k--" if system == "limit" else "o-"
        axes.plot([r.clients for r in mine], [r.tokens_per_s for r in mine], style, label=system)
    axes.set(xlabel="clients", ylabel="tokens/s", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
