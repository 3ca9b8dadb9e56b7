"""LLaVA's own workers behind the gateway: which may register, which are asked, how they fail."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from llava_ray.config import LlavaProtocolConfig, ModelConfig, ServeConfig
from llava_ray.errors import NotAllowedError
from llava_ray.serve.llava.protocol import StatusBody
from llava_ray.serve.llava.worker_registry import MAX_WORKERS, WorkerRegistry, check_address
from llava_ray.serve.llava.worker_request import build_worker_request, name_template
from llava_ray.template import TEMPLATES
from llava_ray.types import PromptRequest, Sampling
from tests.support.llava_client import (
    PATIENCE_S,
    ask,
    generate,
    make_image,
    post,
    read,
    render,
    stream,
)
from tests.support.llava_worker import LlavaWorker

pytestmark = pytest.mark.ray

MODEL = "llava-v1.5-7b"


@pytest.fixture(scope="module")
def gateway(served: str) -> Iterator[str]:
    """Address of an application with one model, `echo`, at which local workers may register."""
    from ray import serve

    from llava_ray.app import build_app

    config = ServeConfig(
        models=[ModelConfig(path="echo", engine="echo", num_cpus=0.1)],
        page=False,
        llava_protocol=LlavaProtocolConfig(workers=["http://127.0.0.1:*"], worker_timeout_s=2),
    )
    serve.run(build_app(config), name="moving", route_prefix="/moving")
    yield f"{served}/moving"
    serve.delete("moving")


@pytest.fixture
def worker(gateway: str) -> Iterator[LlavaWorker]:
    """A worker that has registered; it sends no heartbeats, because none are expected."""
    with LlavaWorker(MODEL) as worker:
        register(gateway, worker)
        yield worker
    post(gateway, "/refresh_all_workers")


def register(gateway: str, worker: LlavaWorker, **fields: Any) -> None:
    body = {**worker.registration, "check_heart_beat": False, **fields}
    assert ask(gateway, "/register_worker", body) is None


def wait_until_listed(gateway: str, models: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (listed := ask(gateway, "/list_models")["models"]) != models:
        assert time.monotonic() < deadline, f"{listed} are listed, not {models}"


def test_a_registered_worker_is_listed_and_asked(gateway: str, worker: LlavaWorker) -> None:
    assert ask(gateway, "/list_models") == {"models": ["echo", MODEL]}
    listed = httpx.get(f"{gateway}/v1/models", timeout=PATIENCE_S).json()["data"]
    assert [model["id"] for model in listed] == ["echo", MODEL]
    assert ask(gateway, "/get_worker_address", {"model": MODEL}) == {"address": gateway}
    assert ask(gateway, "/worker_get_status")["model_names"] == ["echo", MODEL]
    body = {
        "model": MODEL,
        "prompt": render("one two three", num_images=1),
        "temperature": 0.2,
        "top_p": 0.7,
        "max_new_tokens": 512,
        "stop": "</s>",
        "images": [make_image()],
    }
    texts = [read(item) for item in stream(gateway, body)]
    assert texts[-1] == (body["prompt"] + " one two three", 0)
    assert (body["prompt"] + " one", 0) in texts
    assert worker.asked == [body]


def test_the_openai_client_reaches_a_worker_through_its_models_template(
    gateway: str, worker: LlavaWorker
) -> None:
    image = {"url": f"data:image/png;base64,{make_image()}"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "one two"}]
    messages: Any = [{"role": "user", "content": content}]
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=9
        )
        assert answer.choices[0].message.content == "one two"
        pieces = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        words = [piece.choices[0].delta.content or "" for piece in pieces]
        assert "".join(words) == "one two"
        with pytest.raises(openai.BadRequestError, match="seed is not supported by LLaVA's own"):
            client.chat.completions.create(model=MODEL, messages=messages, seed=1)
    assert worker.asked[0] == {
        "model": MODEL,
        "prompt": render("one two", num_images=1),
        "temperature": 0,
        "top_p": 1,
        "max_new_tokens": 9,
        "stop": "</s>",
        "images": [make_image()],
    }


def test_a_stop_text_ends_the_answer_although_such_workers_go_on(
    gateway: str, worker: LlavaWorker
) -> None:
    prompt = render("one two three")
    assert generate(gateway, MODEL, prompt, stop="two") == (prompt + " one ", 0)
    prompt = render("trim this")  # the worker takes `###` off and goes on
    assert generate(gateway, MODEL, prompt, stop="###") == (prompt + " trim this", 0)


def test_a_model_that_is_served_here_is_not_asked_of_a_worker(gateway: str) -> None:
    with LlavaWorker("echo") as worker:
        register(gateway, worker)
        assert ask(gateway, "/list_models") == {"models": ["echo"]}
        assert generate(gateway, "echo", "hello") == ("hellohello (0 images)", 0)
        assert worker.asked == []
    post(gateway, "/refresh_all_workers")


def test_an_error_of_a_worker_is_told_with_its_address(gateway: str, worker: LlavaWorker) -> None:
    *_, last = stream(gateway, {"model": MODEL, "prompt": render("please do fail")})
    text, code = read(last)
    assert code == 1
    assert worker.address in text
    assert "reports error 1" in text
    assert MODEL in ask(gateway, "/list_models")["models"]


def test_a_worker_is_not_asked_what_it_could_only_refuse(gateway: str, worker: LlavaWorker) -> None:
    text, code = generate(gateway, MODEL, render("none"), images=[make_image()])
    assert code == 1
    assert "names 0 images and 1 came" in text
    assert worker.asked == []


def test_a_worker_that_breaks_off_in_the_middle_is_error_3(
    gateway: str, worker: LlavaWorker
) -> None:
    prompt = render("please do break")
    *_, before, last = stream(gateway, {"model": MODEL, "prompt": prompt})
    assert read(before) == (prompt + " please do", 0)
    text, code = read(last)
    assert code == 3
    assert f"{worker.address} did not respond as expected" in text


def test_when_a_worker_dies_another_one_answers_and_without_one_the_error_says_so(
    gateway: str, worker: LlavaWorker
) -> None:
    with LlavaWorker(MODEL, queue_length=5) as other:
        register(gateway, other)
        assert generate(gateway, MODEL, render("first"))[1] == 0
        assert (len(worker.asked), len(other.asked)) == (1, 0)
        worker.close()
        prompt = render("second")
        assert generate(gateway, MODEL, prompt) == (prompt + " second", 0)
        assert len(other.asked) == 1
    text, code = generate(gateway, MODEL, render("third"))
    assert code == 3
    assert f"no worker of {MODEL!r} is available" in text
    assert other.address in text
    assert ask(gateway, "/list_models") == {"models": ["echo"]}
    assert generate(gateway, MODEL, render("fourth"))[1] == 2


def test_a_worker_whose_heart_beats_stop_is_gone_and_its_next_one_brings_it_back(
    gateway: str,
) -> None:
    with LlavaWorker(MODEL) as worker:
        beat = {"worker_name": worker.address, "queue_length": 1}
        assert ask(gateway, "/receive_heart_beat", beat) == {"exist": False}
        register(gateway, worker, check_heart_beat=True)
        assert ask(gateway, "/receive_heart_beat", beat) == {"exist": True}
        assert ask(gateway, "/list_models") == {"models": ["echo", MODEL]}
        wait_until_listed(gateway, ["echo"])
        assert ask(gateway, "/receive_heart_beat", beat) == {"exist": False}


def test_refreshing_forgets_the_dead_and_asks_the_living(gateway: str, worker: LlavaWorker) -> None:
    worker.model = "renamed"
    post(gateway, "/refresh_all_workers")
    assert ask(gateway, "/list_models") == {"models": ["echo", "renamed"]}
    worker.close()
    post(gateway, "/refresh_all_workers")
    assert ask(gateway, "/list_models") == {"models": ["echo"]}


def test_a_worker_without_a_status_is_asked_for_it(gateway: str) -> None:
    with LlavaWorker("quiet") as worker:
        register(gateway, worker, worker_status=None)
        assert ask(gateway, "/list_models") == {"models": ["echo", "quiet"]}
    post(gateway, "/refresh_all_workers")
    for address in (worker.address, "http://127.0.0.1:99999"):
        body = {"worker_name": address, "check_heart_beat": False}
        reply = post(gateway, "/register_worker", body)
        assert reply.status == 400
        assert "did not report its status" in json.loads(reply.body)["text"]


GOOD = {"worker_name": "http://127.0.0.1:1", "check_heart_beat": True}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/register_worker", b"{", "not JSON"),
        ("/register_worker", {}, "worker_name is missing"),
        ("/register_worker", {**GOOD, "worker_name": 1}, "worker_name=1"),
        ("/register_worker", {**GOOD, "check_heart_beat": []}, "check_heart_beat="),
        ("/register_worker", {**GOOD, "worker_status": {}}, "model_names is missing"),
        (
            "/register_worker",
            {**GOOD, "worker_status": {"model_names": ["a"], "speed": 0, "queue_length": 0}},
            "speed=0",
        ),
        ("/receive_heart_beat", {"worker_name": "http://127.0.0.1:1"}, "queue_length is missing"),
        ("/receive_heart_beat", {"worker_name": "http://127.0.0.1:1", "queue_length": -1}, "=-1"),
    ],
)
def test_a_bad_registration_or_heart_beat_is_refused(
    gateway: str, path: str, body: Any, words: str
) -> None:
    reply = post(gateway, path, body)
    assert reply.status == 400
    assert json.loads(reply.body)["error_code"] == 1
    assert words in json.loads(reply.body)["text"]


def test_nobody_registers_where_the_configuration_names_no_worker(served: str) -> None:
    for path in ("/register_worker", "/receive_heart_beat"):
        reply = post(served, path, {**GOOD, "queue_length": 0})
        assert reply.status == 403
        assert "may not register here" in json.loads(reply.body)["text"]
    assert ask(served, "/list_models") == {"models": ["echo", "other"]}


ALLOWED = [
    "http://gpu-1:*",
    "http://10.0.0.5:40000",
    "https://llava.example/worker",
    "http://[::1]:*",
]


@pytest.mark.parametrize(
    "address",
    [
        "http://gpu-1:40000",
        "http://gpu-1:1/",
        "http://gpu-1",
        "http://10.0.0.5:40000",
        "https://llava.example/worker",
        "http://[::1]:8000",
    ],
)
def test_an_address_that_is_allowed(address: str) -> None:
    assert check_address(address, ALLOWED) == address.rstrip("/")


@pytest.mark.parametrize(
    "address",
    [
        "http://gpu-2:40000",
        "https://gpu-1:40000",
        "http://gpu-1:*",
        "http://gpu-1:40000/admin",
        "http://gpu-1:40000?x=",
        "http://gpu-1:40000#",
        "http://gpu-1@evil.example:40000",
        "http://user:key@gpu-1:40000",
        "http://gpu-1:40000@evil.example",
        "http://gpu-1:40000\\@evil.example",
        "http://gpu-1:40000\r\n",
        "http://gpu-1.evil.example:40000",
        "http://10.0.0.5:40001",
        "http://0xa.0.0.5:40000",
        "http://167772165:40000",
        "http://[::ffff:10.0.0.5]:40000",
        "https://llava.example/worker/../admin",
        "ftp://gpu-1:40000",
        "file:///etc/passwd",
        "gpu-1:40000",
        "",
        "http://",
        "http://gpu-1:999999",
    ],
)
def test_an_address_that_is_not_allowed(address: str) -> None:
    with pytest.raises(NotAllowedError):
        check_address(address, ALLOWED)


@pytest.mark.parametrize("pattern", ["gpu-1:*", "http://*:40000", "http://gpu-*:1", "*"])
def test_the_list_of_allowed_workers_names_hosts(pattern: str) -> None:
    with pytest.raises(ValidationError):
        LlavaProtocolConfig(workers=[pattern])


def status(*models: str, speed: float = 1, queue_length: int = 0) -> StatusBody:
    return StatusBody(model_names=list(models), speed=speed, queue_length=queue_length)


def test_the_shortest_queue_for_its_speed_is_chosen() -> None:
    async def choose() -> list[str]:
        workers = WorkerRegistry(LlavaProtocolConfig())
        await workers.register("http://fast:1", False, status("m", speed=2, queue_length=1))
        await workers.register("http://slow:1", False, status("m", queue_length=1))
        await workers.register("http://other:1", False, status("n"))
        return [(await workers.choose(model)) for model in ("m", "m", "m", "m", "n", "nothing")]

    fast, slow = "http://fast:1", "http://slow:1"
    assert asyncio.run(choose()) == [fast, fast, slow, fast, "http://other:1", ""]


def test_a_lottery_draws_by_speed() -> None:
    async def draw() -> list[str]:
        workers = WorkerRegistry(LlavaProtocolConfig(dispatch_method="lottery"))
        await workers.register("http://fast:1", False, status("m", speed=3))
        await workers.register("http://slow:1", False, status("m", speed=1))
        return [await workers.choose("m") for _ in range(1000)]

    assert 600 < asyncio.run(draw()).count("http://fast:1") < 900


def test_a_heart_beat_keeps_a_worker_and_only_those_that_promised_some_expire() -> None:
    now = [0.0]

    async def live() -> None:
        workers = WorkerRegistry(LlavaProtocolConfig(worker_timeout_s=60), clock=lambda: now[0])
        await workers.register("http://a:1", True, status("a"))
        await workers.register("http://b:1", False, status("b"))
        for now[0] in (15.0, 30.0, 45.0):
            assert await workers.note_heart_beat("http://a:1", 0)
        now[0] = 104.0
        assert await workers.list_models() == ["a", "b"]
        now[0] = 106.0
        assert await workers.list_models() == ["b"]
        assert not await workers.note_heart_beat("http://a:1", 0)

    asyncio.run(live())


def test_the_table_of_workers_does_not_grow_without_end() -> None:
    async def fill() -> str:
        workers = WorkerRegistry(LlavaProtocolConfig())
        for port in range(1, MAX_WORKERS + 1):
            assert not await workers.register(f"http://a:{port}", False, status("m"))
        assert not await workers.register("http://a:1", False, status("m"))
        return await workers.register("http://a:9999", False, status("m"))

    assert "already 256 workers" in asyncio.run(fill())


@pytest.mark.parametrize(
    ("model", "template"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("llava-v1.6-vicuna-7b", "llava_v1"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("LLaVA-Hermes-Mixtral", "chatml_direct"),
        ("llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        ("LLaVA-Lightning-MPT-7B-preview", "mpt"),
        ("LLaVA-13b-delta-v0", "llava_v0"),
        ("llava-7b-v1-mmtag", "v1_mmtag"),
        ("llava-v1-plain", "v1_mmtag"),
        ("llava-plain-finetune", "llava_v0"),
        ("llava-plain", "v0_mmtag"),
        ("mpt-7b", "mpt"),
        ("llama-2-7b", "llama_2"),
        ("vicuna-13b", "vicuna_v1"),
    ],
)
def test_the_template_of_a_name_is_the_one_of_llavas_page(model: str, template: str) -> None:
    assert name_template(model) == template
    assert template in TEMPLATES


def test_a_worker_is_never_asked_for_more_than_it_says_and_always_gets_a_stop_text() -> None:
    sampling = Sampling(max_tokens=None, stop=())
    call = build_worker_request(PromptRequest("r", "m", "p", (), sampling))
    assert call.body["max_new_tokens"] == 1024
    assert call.body["stop"] == "</s>"
