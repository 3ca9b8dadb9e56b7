"""vLLM and SGLang behind the application: images over HTTP, and kill -9 of what computes.

    LLAVA_RAY_VLLM_PYTHON=.../bin/python LLAVA_RAY_SGLANG_PYTHON=.../bin/python \\
        pytest -m "vllm or sglang" tests/engine/test_engines_serve.py
"""

import base64
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import psutil
import pytest

from llava_ray.config import ModelConfig, ServeConfig
from llava_ray.model.build.random_model import TINY
from llava_ray.model.export.export import export_model
from tests.support.tiny_checkpoint import make_image, tiny_model
from tests.support.wait import wait_until, wait_until_ended

# Widths: the least that vLLM's kernels take.
SHAPE = replace(TINY, hidden_size=128, vision_hidden_size=64, context_length=4096)
TIMEOUT_S = 300
NEW_TOKENS = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}
ENDLESS = NEW_TOKENS | {"max_tokens": 4000, "stream": True}
REFUSES: dict[str, tuple[str, ...]] = {"vllm": (), "sglang": ("repetition_penalty", "seed")}
ROUNDING = 0.05
"""Of logprobs: torchvision, which the engines use, scales images with other roundings."""
OPTIONS: dict[str, dict[str, Any]] = {"vllm": {"enforce_eager": True}, "sglang": {}}

pytestmark = pytest.mark.slow


@dataclass
class ServedTwice:
    """An application that serves one checkpoint twice: as `ours` and as `theirs`."""

    url: str
    app: str
    refuses: tuple[str, ...]

    def ask(self, model: str, text: str, *, num_images: int = 0, **fields: Any) -> dict[str, Any]:
        body = {"model": model, "messages": [say(text, num_images)], **NEW_TOKENS, **fields}
        reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
        return reply.json() | {"status": reply.status_code}

    def find_replica(self) -> int | None:
        """Return the process id of the replica of `theirs`, if it is running."""
        from ray.serve.context import _get_global_client

        details: Any = _get_global_client().get_serve_details()
        replicas = details["applications"][self.app]["deployments"]["theirs"]["replicas"]
        running = [one["pid"] for one in replicas if one["state"] == "RUNNING"]
        return running[0] if running else None


def say(text: str, num_images: int) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for seed in range(num_images):
        file = io.BytesIO()
        make_image(seed).save(file, "PNG")
        address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def find_worker(replica: int) -> psutil.Process:
    """Return the process that computes: the largest of those that the engine has started."""
    (engine,) = psutil.Process(replica).children()
    return max(engine.children(), key=lambda process: process.memory_info().rss)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in OPTIONS],
)
def twice(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedTwice]:
    name = request.param
    variable = f"LLAVA_RAY_{name.upper()}_PYTHON"
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} is not set: it names the Python of an environment with {name}")
    url = request.getfixturevalue("served")
    from ray import serve

    from llava_ray.app import build_app

    ours = ModelConfig(
        path=str(
            export_model(tiny_model(SHAPE), tmp_path_factory.mktemp("exported") / "hf", to="hf")
        ),
        name="ours",
        dtype="float32",
        device="cpu",
        num_cpus=0.1,
        num_threads=1,
        messages_per_s=10**9,
    )
    options = {"python": python, **OPTIONS[name]}
    update = {"name": "theirs", "engine": name, "engine_options": options}
    theirs = ours.model_copy(update=update)
    app = f"engines-{name}"
    serve.run(
        build_app(ServeConfig(models=[ours, theirs], page=False)), name=app, route_prefix=f"/{app}"
    )
    twice = ServedTwice(f"{url}/{app}", app, REFUSES[name])
    yield twice
    replica = twice.find_replica()
    assert replica, "it runs to the end"
    processes = psutil.Process(replica).children(recursive=True)
    serve.delete(app)
    wait_until_ended(processes)  # and leave no memory behind


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_it_says_about_images_what_our_own_engine_says(twice: ServedTwice, num_images: int) -> None:
    ours, theirs = (
        twice.ask(model, "What is it?", num_images=num_images, logprobs=True, top_logprobs=2)
        for model in ("ours", "theirs")
    )
    assert ours["status"] == theirs["status"] == 200, theirs
    assert theirs["choices"][0]["message"] == ours["choices"][0]["message"]
    assert theirs["choices"][0]["finish_reason"] == "length"
    counts = ("prompt_tokens", "completion_tokens")
    assert [theirs["usage"][key] for key in counts] == [ours["usage"][key] for key in counts]
    told = (reply["choices"][0]["logprobs"]["content"] for reply in (ours, theirs))
    for mine, other in zip(*told, strict=True):
        assert other["token"] == mine["token"]
        assert other["logprob"] == pytest.approx(mine["logprob"], abs=ROUNDING)


def test_every_field_of_sampling_is_taken_or_refused_by_name(twice: ServedTwice) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.01,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "stop_token_ids": [5],
        "stop": ["never said"],
        "n": 2,
    }
    for name in twice.refuses:
        refused = twice.ask("theirs", "Who?", **{name: fields.pop(name)})
        assert (refused["status"], refused["error"]["param"]) == (400, name)
    first, again = (twice.ask("theirs", "Who?", num_images=1, **fields) for _ in range(2))
    assert first["status"] == 200, first
    assert len(first["choices"]) == 2
    if "seed" in fields:
        assert again["choices"] == first["choices"], "the same seed"
    bent = twice.ask("theirs", "Who?", logit_bias={"70": 100})
    if bent["status"] == 200:
        assert len(set(bent["choices"][0]["message"]["content"])) == 1
    else:
        assert (bent["status"], bent["error"]["param"]) == (400, "logit_bias")
    long = twice.ask("theirs", "Who? " * 10_000)
    assert (long["status"], long["error"]["code"]) == (400, "context_length_exceeded")


def test_kill_9_of_what_computes_fails_what_runs_and_brings_a_new_replica(
    twice: ServedTwice,
) -> None:
    before = twice.find_replica()
    assert before is not None
    body = {"model": "theirs", "messages": [say("Go on", 1)], **ENDLESS}
    address = f"{twice.url}/v1/chat/completions"
    worker = find_worker(before)
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", address, json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == 2:
                worker.kill()
    assert "try again" in events[-1]["error"]["message"]

    wait_until(
        lambda: twice.find_replica() not in (None, before), "another runs", patience_s=TIMEOUT_S
    )
    assert twice.ask("theirs", "Are you there?", num_images=1)["status"] == 200
