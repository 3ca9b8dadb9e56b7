"""The systems that the serving benchmark compares: how each is started, asked and stopped."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmark_requests import Ask, BenchmarkQuestion, Load

from llava_ray.template import Template

GREEDY = {"temperature": 0, "ignore_eos": True}

SETTLE_S = 20
"""Wait after a server is ready, so that its remaining start-up work is not measured."""


@contextlib.contextmanager
def open_llava_ray(load: Load) -> Iterator[Ask]:
    """The whole application, as `llava-ray serve` starts it."""
    port = find_port()
    command = [sys.executable, "-m", "llava_ray.cli", "serve", load.model, "--no-page"]
    options = ["--dtype", load.dtype or "auto", "--quantization", load.quantization]
    environment = {"RAY_AUTH_MODE": "disabled"}
    url = f"http://127.0.0.1:{port}"
    with run_server([*command, *options, "--port", str(port)], f"{url}/readyz", environment):
        yield ask_over_http(url, max_tokens=load.max_tokens)


@contextlib.contextmanager
def open_vllm(load: Load) -> Iterator[Ask]:
    """vLLM's own server, in its own environment."""
    port = find_port()
    command = [os.environ["LLAVA_RAY_VLLM_PYTHON"], "-m", "vllm.entrypoints.cli.main", "serve"]
    options = ["--port", str(port), "--dtype", load.name_dtype()]
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
def open_transformers(load: Load) -> Iterator[Ask]:
    """`transformers serve` with its default settings: one request after the other.

    It refuses `ignore_eos`; the minimum length of answers goes into fields of its own.
    """
    port = find_port()
    command = ["transformers", "serve", load.model, "--port", str(port)]
    command += ["--dtype", load.name_dtype()]
    length = {"max_new_tokens": load.max_tokens, "min_new_tokens": load.max_tokens}
    options = {"generation_config": json.dumps(length | {"do_sample": False})}
    url = f"http://127.0.0.1:{port}"
    with run_server(command, f"{url}/health", {"HF_HUB_OFFLINE": "1"}):
        yield ask_over_http(url, max_tokens=load.max_tokens, model=load.model, options=options)


@contextlib.contextmanager
def run_server(command: Sequence[str], url: str, environment: dict[str, str]) -> Iterator[None]:
    """Run a server until the block ends; the block begins once `url` answers with 200."""
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
            time.sleep(SETTLE_S)
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


def ask_over_http(
    base_url: str, *, max_tokens: int, model: str = "", options: Mapping[str, Any] = GREEDY
) -> Ask:
    """Stream chat completions as an OpenAI client does.

    Args:
        model: the model's name at the server; empty: the first one that it lists.
        options: further fields of the body.
    """
    import httpx

    from llava_ray.images import to_data_url

    model = model or httpx.get(f"{base_url}/v1/models").json()["data"][0]["id"]
    client = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))

    async def ask(question: BenchmarkQuestion) -> AsyncIterator[int]:
        image = {"type": "image_url", "image_url": {"url": to_data_url(question.image)}}
        content = [image, {"type": "text", "text": question.text}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
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
    """The engine of a replica, with the application's prompts but without HTTP and Serve."""
    from llava_ray.config import ModelConfig
    from llava_ray.engine.factory import load_engine
    from llava_ray.types import Prompt, Sampling

    settings = {"dtype": load.dtype or "auto", "quantization": load.quantization}
    engine = load_engine(ModelConfig.model_validate({"path": load.model} | settings))
    sampling = Sampling(temperature=0, max_tokens=load.max_tokens, ignore_eos=True)

    async def ask(question: BenchmarkQuestion) -> AsyncIterator[int]:
        name = f"{random.getrandbits(64):x}"
        text = render(engine.template, question)
        async for chunk in engine.stream(Prompt(name, text, (question.image,), sampling)):
            yield chunk.num_tokens

    try:
        yield ask
    finally:
        asyncio.run(engine.close())


@contextlib.contextmanager
def open_generate(load: Load, dtype: str = "") -> Iterator[Ask]:
    """LLaVA's model worker without HTTP: a thread and a `generate` for each request."""
    yield ask_a_generate_each(
        load.model, dtype=dtype or load.name_dtype(), max_tokens=load.max_tokens
    )


OPENERS: dict[str, Callable[[Load], contextlib.AbstractContextManager[Ask]]] = {
    "llava_ray": open_llava_ray,
    "engine": open_engine,
    "vllm": open_vllm,
    "transformers": open_transformers,
    "generate": open_generate,
    "generate-float16": lambda load: open_generate(load, "float16"),
}


def ask_a_generate_each(path: str, *, dtype: str, max_tokens: int, at_once: int = 5) -> Ask:
    """Return an `Ask` that works as LLaVA's model worker does.

    At most `at_once` requests run together (`--limit-model-concurrency`, 5 in LLaVA) and none are
    batched. It is called in this process, so unlike the others it pays nothing for HTTP.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    from llava_ray.model.loading import load_model

    core = load_model(path, dtype=dtype)
    free = asyncio.Semaphore(at_once)

    class Arrivals(BaseStreamer):
        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.loop, self.queue = loop, asyncio.Queue()
            self.num_calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.num_calls += 1  # the first call has the prompt
            self.loop.call_soon_threadsafe(self.queue.put_nowait, self.num_calls - 1)

        def end(self) -> None:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, None)

    def generate(question: BenchmarkQuestion, arrivals: Arrivals) -> None:
        inputs = core.encode(render(core.template, question), [question.image])
        with torch.inference_mode():
            core.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                streamer=arrivals,
            )

    async def ask(question: BenchmarkQuestion) -> AsyncIterator[int]:
        async with free:
            arrivals = Arrivals(asyncio.get_running_loop())
            running = asyncio.create_task(asyncio.to_thread(generate, question, arrivals))
            while (num_tokens := await arrivals.queue.get()) is not None:
                if num_tokens:
                    yield num_tokens
            await running

    return ask


def render(template: Template, question: BenchmarkQuestion) -> str:
    """Return the prompt that the application builds from a question."""
    from llava_ray.types import ImagePart, Message, TextPart

    return template.render([Message("user", (ImagePart(b""), TextPart(question.text)))])
