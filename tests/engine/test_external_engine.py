"""Engines in processes of their own: what all of them do, with a scripted one; then vLLM
and SGLang themselves, through the application, where their environments are."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llava_ray.config import ModelConfig
from llava_ray.engine.external.engine import ExternalEngine
from llava_ray.engine.external.settings import ExternalEngineKind
from llava_ray.engine.external.sglang_engine import SGLANG
from llava_ray.engine.factory import load_engine
from llava_ray.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    RequestError,
    UnsupportedError,
)
from llava_ray.model.build.random_model import TINY
from llava_ray.types import TokenLogprob
from tests.support.engine_requests import answer, prompt, read, read_some
from tests.support.scripted_worker import MISCHIEF
from tests.support.tiny_checkpoint import make_image, tiny_model
from tests.support.wait import wait_until_ended

IMAGE_TOKENS = (TINY.image_size // TINY.patch_size) ** 2
SCRIPTED = ExternalEngineKind(
    "scripted",
    "The scripted engine",
    lambda config, folder, on_gpu: {"folder": str(folder), "image_tokens": IMAGE_TOKENS},
    lambda config, on_gpu: {},
    unsupported=lambda config: ("logit_bias",),
    program=Path(__file__).parents[1] / "support" / "scripted_worker.py",
)


@pytest.fixture(scope="module", autouse=True)
def _exports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("exports")))
        yield


def load(**options: Any) -> ExternalEngine:
    options = {"python": sys.executable} | options
    return ExternalEngine(ModelConfig(path=str(tiny_model()), engine_options=options), SCRIPTED)


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[ExternalEngine]:
    engine = load(**options)
    try:
        yield engine
    finally:
        await engine.close()


def play(scene: Callable[[ExternalEngine], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with opened(**options) as engine, asyncio.timeout(60):
            await scene(engine)

    asyncio.run(run())


def test_tokens_become_text_with_stop_texts_limits_and_logprobs() -> None:
    async def scene(engine: ExternalEngine) -> None:
        chunks = await read(engine, prompt("how do you do", max_tokens=None))
        assert "".join(chunk.text for chunk in chunks) == "how do you do"
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
        length = chunks[-1].num_prompt_tokens
        assert chunks[-1].num_tokens == length > 5

        (*_, last) = await read(engine, prompt("how do you do", max_tokens=3))
        assert (last.finish_reason, last.num_tokens) == ("length", 3)

        stopped = prompt("how do you do", max_tokens=None, stop=("you",))
        assert await answer(engine, stopped) == "how do "
        late = replace(stopped, sampling=replace(stopped.sampling, min_tokens=length))
        assert await answer(engine, late) == "how do you do"

        chunks = await read(engine, prompt("hé!", max_tokens=None, num_logprobs=1))
        told = [each for chunk in chunks for each in chunk.logprobs]
        assert b"".join(each.data for each in told).decode().endswith("hé!")
        assert told[-1] == TokenLogprob(b"!", -0.5, ((b"!", -0.5),))

    play(scene)


def test_images_arrive_as_they_are() -> None:
    async def scene(engine: ExternalEngine) -> None:
        image = make_image(3, width=48, height=40)
        ids = [48, 40, *image.getpixel((0, 0))]
        said = await answer(engine, prompt("<image> what?", image, max_tokens=99))
        assert said == await engine.detokenize(ids)
        (*_, last) = await read(engine, prompt("<image> what?", image, max_tokens=99))
        assert (
            last.num_image_tokens == len((await engine.tokenize(prompt("<image>", image))).ids) - 1
        )

    play(scene)


def test_many_are_answered_at_once_and_who_leaves_is_forgotten() -> None:
    async def scene(engine: ExternalEngine) -> None:
        words = [f"these are the words of number {number}" for number in range(8)]
        leaving = [read_some(engine, prompt(text, max_tokens=None), 2) for text in words[4:]]
        staying = [answer(engine, prompt(text, max_tokens=None)) for text in words[:4]]
        said = await asyncio.gather(*staying, *leaving)
        assert said[:4] == words[:4]
        assert engine.stats()["num_running"] == engine.stats()["num_waiting"] == 0
        (last, *_) = await read(engine, prompt("alone?", max_tokens=1))
        assert last.num_cached_tokens == 1, "the child still computes for those who left"

    play(scene, pause_s=0.01)


def test_what_cannot_be_done_is_refused_before_it_is_sent() -> None:
    async def scene(engine: ExternalEngine) -> None:
        with pytest.raises(ContextLengthError, match="ask for at most"):
            await read(engine, prompt("hello", max_tokens=10**6))
        with pytest.raises(UnsupportedError, match="engine='scripted'") as caught:
            await read(engine, prompt("hello", logit_bias=((1, 5.0),)))
        assert caught.value.param == "logit_bias"
        with pytest.raises(RequestError, match="this is not for me"):
            await read(engine, prompt("hello", seed=MISCHIEF["refuse"]))
        for mischief, words in (("fail", "a fault of mine"), ("miscount", "reads 1 tokens")):
            with pytest.raises(EngineError, match=words):
                await read(engine, prompt("hello", seed=MISCHIEF[mischief]))
        assert await answer(engine, prompt("hello", max_tokens=None)) == "hello"
        assert engine.stats()["num_running"] == 0
        await engine.check()

    play(scene)


@pytest.mark.parametrize("how", ["killed", "broken"])
def test_an_engine_that_ends_fails_what_is_running_at_once_and_its_health(how: str) -> None:
    async def scene(engine: ExternalEngine) -> None:
        await engine.check()
        seed = MISCHIEF["stay silent" if how == "killed" else "break"]
        waiting = asyncio.create_task(read(engine, prompt("hello", seed=seed)))
        if how == "killed":
            while not engine.stats()["num_waiting"]:
                await asyncio.sleep(0.01)
            os.kill(engine._process._process.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"has ended|a process of mine has ended"):
            await waiting
        assert time.monotonic() - started < 30  # and not the hour that it would be silent
        with pytest.raises(EngineError, match="try again"):
            await engine.check()
        with pytest.raises(EngineError, match="try again"):
            await read(engine, prompt("hello"))
        assert engine._process._process.wait(30) is not None

    play(scene)


@pytest.mark.parametrize("how", ["it is killed", "its replica is gone", "and it hangs"])
def test_what_an_engine_has_started_ends_with_it(how: str) -> None:
    settings = {"image_tokens": IMAGE_TOKENS, "starts": ["sleep", "3600"], "hangs": "hangs" in how}
    with subprocess.Popen(
        [sys.executable, str(SCRIPTED.program), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        assert child.stdin
        assert child.stdout
        assert b"ready" in child.stdout.readline()
        started = psutil.Process(child.pid).children(recursive=True)
        assert "sleep" in [process.name() for process in started]
        if how == "it is killed":
            child.kill()
        else:
            child.stdin.close()
        wait_until_ended(started)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fails": True}, "has ended; it printed last:\nno such device"),
        ({"puase_s": 1}, r"unknown setting engine_options.puase_s: did you mean pause_s\?"),
        ({"pyhton": "x"}, r"unknown setting engine_options.pyhton: did you mean python\?"),
        ({"python": "/nowhere/python"}, "cannot start The scripted engine"),
    ],
)
def test_an_engine_that_does_not_start_says_why(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(**options)


def test_an_engine_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("vllm", "sglang"):
        monkeypatch.delenv(f"LLAVA_RAY_{name.upper()}_PYTHON", raising=False)
        config = ModelConfig(path=str(tiny_model()), engine=name)
        with pytest.raises(ConfigError, match=f"pip install {name}.*engine_options.python"):
            load_engine(config)


def test_sglang_refuses_what_it_would_do_otherwise_than_ours() -> None:
    usual = SGLANG.unsupported(ModelConfig(engine="sglang"))
    options = {"enable_deterministic_inference": True}
    exact = SGLANG.unsupported(ModelConfig(engine="sglang", engine_options=options))
    assert (usual, exact) == (("repetition_penalty", "seed"), ("repetition_penalty", "min_p"))


def test_options_of_another_engine_s_are_refused() -> None:
    with pytest.raises(ConfigError, match="engine_options are for vllm and sglang"):
        load_engine(ModelConfig(path="echo", engine="echo", engine_options={"python": "x"}))


# The engines themselves

SHAPE = replace(TINY, hidden_size=128, vision_hidden_size=64)  # the least that vLLM's kernels take
QUESTIONS = [("USER: <image>\nWhat is it? ASSISTANT:", 1), ("USER: Who? ASSISTANT:", 0)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("vllm", "sglang")]
)
def test_real_engines_give_the_tokens_of_ours_and_die_loudly(name: str) -> None:
    if not os.environ.get(f"LLAVA_RAY_{name.upper()}_PYTHON"):
        pytest.skip(f"set LLAVA_RAY_{name.upper()}_PYTHON")
    model = str(tiny_model(SHAPE))
    options = {"enforce_eager": True} if name == "vllm" else {}
    config = ModelConfig(
        path=model, engine=name, dtype="float32", device="cpu", context_length=512,
        engine_options=options,
    )  # fmt: skip
    ours = load_engine(config.model_copy(update={"engine": "torch", "engine_options": {}}))
    theirs = load_engine(config)
    assert isinstance(theirs, ExternalEngine)

    async def scene() -> None:
        asked = [
            prompt(text, *[make_image(i) for i in range(count)], max_tokens=12, ignore_eos=True)
            for text, count in QUESTIONS
        ]
        for each in asked:
            ((*_, expected), (*_, found)) = await asyncio.gather(
                read(ours, each), read(theirs, each)
            )
            assert found.num_tokens == expected.num_tokens == 12
            assert found.num_prompt_tokens == expected.num_prompt_tokens
            assert await answer(theirs, each) == await answer(ours, each)
        assert await read_some(theirs, replace(asked[0], sampling=replace(
            asked[0].sampling, max_tokens=300)), 3)  # fmt: skip
        assert theirs.stats()["num_running"] == 0
        endless = replace(asked[1], sampling=replace(asked[1].sampling, max_tokens=400))
        waiting = asyncio.create_task(read(theirs, endless))
        while not theirs.stats()["num_running"]:
            await asyncio.sleep(0.01)
        os.kill(theirs._process._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            await waiting
        with pytest.raises(EngineError):
            await theirs.check()
        await theirs.close()
        await ours.close()

    asyncio.run(scene())
