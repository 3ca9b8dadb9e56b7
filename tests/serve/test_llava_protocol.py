"""LLaVA's own protocol: its clients talk to the gateway as they did to its controller."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from llava_ray.config import LimitsConfig, ModelConfig, ServeConfig
from llava_ray.errors import (
    EngineError,
    ImageError,
    LlavaRayError,
    ModelNotFoundError,
    OverloadedError,
)
from llava_ray.serve.gateway.llava_routes import PATHS
from llava_ray.serve.llava import protocol
from llava_ray.types import Chunk, PromptRequest
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
from tests.support.local_gateway import KEYS, Nearby, run_nearby

pytestmark = pytest.mark.ray

GENERATE = "/worker_generate_stream"


def test_a_client_finds_its_model_and_chats_about_an_image(served: str) -> None:
    assert post(served, "/refresh_all_workers").body == b"null"
    assert ask(served, "/list_models") == {"models": ["echo", "other"]}
    address = ask(served, "/get_worker_address", {"model": "echo"})["address"]
    assert address == served
    prompt = render("What is this?", num_images=1)
    body = {
        "model": "echo",
        "prompt": prompt,
        "temperature": 0.2,
        "top_p": 0.7,
        "max_new_tokens": 512,
        "stop": "</s>",
        "images": [make_image()],
    }
    objects = list(stream(address, body))
    texts = [read(item)[0] for item in objects]
    assert [read(item)[1] for item in objects] == [0] * len(objects)
    assert texts[-1] == prompt + "What is this? (1 images)"
    assert len(texts) > 3
    for before, after in zip([prompt, *texts], texts, strict=False):
        assert after.startswith(before)
    assert objects == [
        json.dumps({"text": text, "error_code": 0}).encode() + b"\0" for text in texts
    ]


def test_the_prompt_is_asked_as_it_is_and_only_the_stop_texts_sent_end_the_answer(
    served: str,
) -> None:
    prompt = "no roles, é and 猫 ### </s>"
    said = generate(served, "echo", prompt, max_new_tokens=100)
    assert said == (prompt + prompt + " (0 images)", 0)
    assert generate(served, "echo", prompt, stop="###") == (prompt + "no roles, é and 猫 ", 0)
    assert generate(served, "echo", prompt, stop=["###", "roles"]) == (prompt + "no ", 0)
    assert generate(served, "echo", prompt, max_new_tokens=2) == (prompt + "no roles,", 0)


def test_the_separator_that_test_message_sends_as_a_stop_text_does_not_end_the_answer(
    served: str,
) -> None:
    said, code = generate(served, "echo", "one two three", stop=" ", temperature=0.7)
    assert (said, code) == ("one two three" + "one two three (0 images)", 0)


def test_an_answer_is_cut_to_what_the_context_holds(served: str) -> None:
    prompt = "word " * 4000
    said, code = generate(served, "echo", prompt, max_new_tokens=1024)
    assert code == 0
    assert len(said[len(prompt) :].split()) == 96


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "echo", "prompt": "word " * 5000}, "5,000 tokens"),
        ({"model": "echo", "prompt": "<image>", "images": []}, "names 1 images and 0 came"),
        (
            {"model": "echo", "prompt": "none", "images": [make_image()]},
            "names 0 images and 1 came",
        ),
        ({"model": "echo", "prompt": "<image>", "images": ["aGVsbG8="]}, "not an image"),
        ({"model": "echo", "prompt": "<image>", "images": [make_image()[:64]]}, "damaged"),
    ],
)
def test_what_a_worker_cannot_do_is_error_1_with_the_cause(
    served: str, body: dict[str, Any], words: str
) -> None:
    (item,) = stream(served, body)
    text, code = read(item)
    assert code == 1
    assert words in text


def test_a_model_that_is_not_there_is_error_2_and_has_no_address(served: str) -> None:
    assert ask(served, "/get_worker_address", {"model": "gpt"}) == {"address": ""}
    text, code = generate(served, "gpt", "Hello")
    assert code == 2
    assert "use one of echo, other" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelNotFoundError("gone"), 2),
        (OverloadedError("full"), 3),
        (EngineError("broke"), 1),
        (ImageError("damaged"), 1),
    ],
)
def test_every_error_has_one_of_the_codes_of_the_protocol(error: LlavaRayError, code: int) -> None:
    assert read(protocol.encode_error(error)) == (error.message, code)


LONG = "x" * 501
BAD_BODIES: list[tuple[Any, str]] = [
    (b"", "is empty"),
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "send a JSON object"),
    (b"null", "send a JSON object"),
    (b'{"model": "echo", "prompt": "a", "temperature": NaN}', "NaN is not JSON"),
    ({}, "model is missing"),
    ({"model": "echo"}, "prompt is missing"),
    ({"prompt": "a"}, "model is missing"),
    ({"model": None, "prompt": "a"}, "model=null"),
    ({"model": "", "prompt": "a"}, "model="),
    ({"model": LONG, "prompt": "a"}, "model="),
    ({"model": ["echo"], "prompt": "a"}, "model="),
    ({"model": "echo", "prompt": 7}, "prompt=7"),
    ({"model": "echo", "prompt": None}, "prompt=null"),
    ({"model": "echo", "prompt": "\ud800"}, "surrogate"),
    ({"model": "echo", "prompt": "<image>", "images": ["\ud800"]}, "surrogate"),
    ({"model": "echo", "prompt": "a", "images": "aGVsbG8="}, "images="),
    ({"model": "echo", "prompt": "a", "images": {"0": "a"}}, "images="),
    ({"model": "echo", "prompt": "a", "images": [None]}, "images.0=null"),
    ({"model": "echo", "prompt": "a", "images": ["****"]}, "base64"),
    ({"model": "echo", "prompt": "a", "images": [""]}, "empty"),
    ({"model": "echo", "prompt": "a", "images": ["éééé"]}, "base64"),
    ({"model": "echo", "prompt": "<image>" * 17, "images": ["aGVsbG8="] * 17}, "than the 16"),
    ({"model": "echo", "prompt": "a", "temperature": "hot"}, 'temperature="hot"'),
    ({"model": "echo", "prompt": "a", "temperature": -1}, "temperature=-1"),
    ({"model": "echo", "prompt": "a", "temperature": 10**400}, "temperature="),
    ({"model": "echo", "prompt": "a", "top_p": 1.1}, "top_p=1.1"),
    ({"model": "echo", "prompt": "a", "top_p": None}, "top_p=null"),
    ({"model": "echo", "prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0"),
    ({"model": "echo", "prompt": "a", "max_new_tokens": 1.5}, "max_new_tokens=1.5"),
    ({"model": "echo", "prompt": "a", "max_new_tokens": 10**30}, "max_new_tokens="),
    ({"model": "echo", "prompt": "a", "stop": 5}, "stop"),
    ({"model": "echo", "prompt": "a", "stop": [5]}, "stop"),
]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES)
def test_a_body_that_is_no_request_is_refused_with_a_code_and_the_remedy(
    served: str, body: Any, words: str
) -> None:
    reply = post(served, GENERATE, body)
    text, code = read(reply.body)
    assert (reply.status, code) == (400, 1)
    assert words in text
    assert generate(served, "echo", "well?") == ("well?well? (0 images)", 0)


@pytest.mark.parametrize("body", [b"{", [], {}, {"model": 7}, {"model": "a" * 1000}])
def test_a_bad_question_for_an_address_is_refused(served: str, body: Any) -> None:
    reply = post(served, "/get_worker_address", body)
    assert reply.status == 400
    assert json.loads(reply.body).keys() == {"text", "error_code"}


def test_a_body_that_is_too_large_is_refused(served: str) -> None:
    body = b'{"prompt": "' + b"a" * (33 << 20)
    reply = post(served, GENERATE, body)
    assert reply.status == 413
    text, code = read(reply.body)
    assert code == 1
    assert "bytes allowed" in text


def test_only_post_is_answered(served: str) -> None:
    for path in ("/list_models", GENERATE):
        reply = httpx.get(served + path, timeout=PATIENCE_S)
        assert reply.status_code == 405
        assert reply.json()["error_code"] == 1
        assert "use POST" in reply.json()["text"]


def test_the_gateway_answers_as_a_worker_of_another_controller(served: str) -> None:
    status = ask(served, "/worker_get_status")
    assert status == {"model_names": ["echo", "other"], "speed": 2, "queue_length": 0}


def test_numbers_may_be_written_as_text_and_zero_top_p_is_greedy() -> None:
    body = {"model": "m", "prompt": "p", "temperature": "0.5", "max_new_tokens": "7", "new": 1}
    limits = LimitsConfig()

    def parse(body: dict[str, Any]) -> PromptRequest:
        return protocol.parse_generate(json.dumps(body).encode(), limits=limits, request_id="r")

    sampling = parse(body).sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_p) == (0.5, 7, 1.0)
    assert parse({**body, "top_p": 0}).sampling.temperature == 0
    assert parse({**body, "temperature": 0.001}).sampling.temperature == 0
    default = parse({"model": "m", "prompt": "p"})
    assert (default.sampling.temperature, default.sampling.max_tokens) == (1.0, 256)
    assert default.sampling.stop == ()


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ({}, "{served}/slow"),
        ({"Host": "llava.example"}, "http://llava.example/slow"),
        (
            {"X_Forwarded_Host": "llava.example:8443", "X_Forwarded_Proto": "https"},
            "https://llava.example:8443/slow",
        ),
        (
            {"Host": "llava.example", "Authorization": "Basic dGVhbTprL2V5"},  # team:k/ey
            "http://team:k%2Fey@llava.example/slow",
        ),
        ({"Host": "llava.example", "Authorization": "Basic *"}, "http://llava.example/slow"),
        ({"Host": "llava.example", "Authorization": "Bearer a"}, "http://llava.example/slow"),
    ],
)
def test_the_address_is_the_one_that_the_client_asked(
    served: str, slow: str, headers: dict[str, str], address: str
) -> None:
    reply = post(slow, "/get_worker_address", {"model": "slow"}, **headers)
    assert json.loads(reply.body) == {"address": address.format(served=served)}


LOCKED = {"api_keys": ",".join(f"{name}={key}" for name, key in KEYS.items())}


async def ask_nearby(there: Nearby, path: str, login: str = "", **body: Any) -> httpx.Response:
    """Post to a URL that may have no scheme, as LLaVA's clients do."""
    url = there.url.replace("://", f"://{login}@") if login else there.url
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        return await client.post(url + path, json=body)


def test_with_keys_every_route_wants_one_and_the_address_that_is_given_has_it() -> None:
    async def chat() -> None:
        async with run_nearby(**LOCKED) as there:
            for path in PATHS:
                for login in ("", "any:lr-mallory-0123456789"):
                    reply = await ask_nearby(there, path, login, model="talker", prompt="Hello")
                    assert reply.status_code == 401
                    assert reply.json()["error_code"] == 1
                    assert "API key" in reply.json()["text"]
            assert there.talker.num_started == 0
            login = f"any:{KEYS['bob']}"
            reply = await ask_nearby(there, "/get_worker_address", login, model="talker")
            address = reply.json()["address"]
            assert address == there.url.replace("://", f"://{login}@")
            async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
                body = {"model": "talker", "prompt": "Hello"}
                answer = await client.post(address + GENERATE, json=body)
            assert read(answer.content.split(b"\0")[-2] + b"\0") == ("Hello1 2 3 ", 0)
            usage = (await there.get("/v1/usage", "bob")).json()["data"]
            assert usage[0]["completion_tokens"] == 3
            assert not any(KEYS["bob"] in line for line in there.log)

    asyncio.run(chat())


@pytest.mark.parametrize("words", ["wait", "linger"])
def test_an_answer_that_takes_too_long_is_stopped_and_told(words: str) -> None:
    async def chat() -> None:
        async with run_nearby(limits=LimitsConfig(request_timeout_s=0.3)) as there:
            reply = await ask_nearby(there, GENERATE, model="talker", prompt=words)
            text, code = read(reply.content.split(b"\0")[-2] + b"\0")
            assert code == 1
            assert "longer than the 0.3 s" in text
            while there.talker.num_running:
                await asyncio.sleep(0)

    asyncio.run(chat())


def test_an_answer_is_cut_to_the_tokens_that_are_allowed() -> None:
    async def chat() -> None:
        async with run_nearby(limits=LimitsConfig(max_tokens=5)) as there:
            reply = await ask_nearby(
                there, GENERATE, model="talker", prompt="Hello", max_new_tokens=512
            )
            assert reply.status_code == 200
            assert there.talker.last_request is not None
            assert there.talker.last_request.sampling.max_tokens == 5

    asyncio.run(chat())


@pytest.fixture(scope="module")
def slow(served: str) -> Iterator[str]:
    """Address of an application whose only model behaves as the prompt says."""
    from ray import serve

    from llava_ray.serve.gateway.deployment import Gateway

    class Slow:  # in here, so that Ray sends it to its workers by value
        num_running = 0

        async def stats(self) -> dict[str, float]:
            return {"num_running": self.num_running}

        async def chat(self, request: PromptRequest, _post: object) -> AsyncIterator[Chunk]:
            import asyncio

            from llava_ray.errors import EngineError

            words = request.prompt
            self.num_running += 1
            try:
                for number in range(1, 4):
                    if words == "pause" and number == 1:
                        await asyncio.sleep(4)  # a little longer than the gateway keeps quiet
                    if number == 3 and words == "die later":
                        await asyncio.sleep(1.5)  # what was said is out by then
                        os._exit(1)
                    if number == 3 and words == "break later":
                        raise EngineError("the engine broke: try again")
                    if number == 3 and words == "bug later":
                        raise ValueError("secret detail")
                    while words == "linger" and number == 3:
                        yield Chunk("and ", None, number, 9, 0)
                        await asyncio.sleep(0.01)
                    yield Chunk(f"{number} ", "stop" if number == 3 else None, number, 9, 0)
            finally:
                self.num_running -= 1

    model = serve.deployment(
        name="slow", max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1}
    )(Slow)
    config = ServeConfig(models=[ModelConfig(path="slow", engine="echo")], page=False)
    gateway = serve.deployment(
        name="gateway", max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1}
    )(Gateway)
    models = {"slow": model.bind()}
    serve.run(gateway.bind(config, models), name="slow", route_prefix="/slow")
    yield f"{served}/slow"
    serve.delete("slow")


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("die later", "died and is being replaced"),
        ("break later", "the engine broke: try again"),
        ("bug later", "the server's log has the details"),
    ],
)
def test_an_error_in_the_middle_is_the_last_object_and_tells_the_cause(
    slow: str, words: str, cause: str
) -> None:
    *said, last = stream(slow, {"model": "slow", "prompt": words})
    assert read(said[-1]) == (f"{words}1 2 ", 0)
    text, code = read(last)
    assert code == 1
    assert cause in text
    assert "secret" not in text
    wait_until_running(0)  # the replica is back, or still there


def test_while_nothing_comes_the_client_hears_again_what_it_knows(slow: str) -> None:
    texts = [read(item)[0] for item in stream(slow, {"model": "slow", "prompt": "pause"})]
    assert texts[0] == "pause"
    assert texts[-1] == "pause1 2 3 "


def test_a_client_that_hangs_up_stops_the_replica(slow: str) -> None:
    objects = stream(slow, {"model": "slow", "prompt": "linger"})
    while "and" not in read(next(objects))[0]:
        pass
    wait_until_running(1)
    assert ask(slow, "/worker_get_status")["queue_length"] == 1
    objects.close()  # type: ignore[attr-defined]
    wait_until_running(0)
    deadline = time.monotonic() + PATIENCE_S
    while ask(slow, "/worker_get_status")["queue_length"]:
        assert time.monotonic() < deadline


def wait_until_running(count: int) -> None:
    from ray import serve
    from ray.exceptions import RayActorError

    handle: Any = serve.get_deployment_handle("slow", app_name="slow")
    deadline = time.monotonic() + PATIENCE_S
    num_running = None
    while num_running != count:
        assert time.monotonic() < deadline, f"{num_running} requests are running, not {count}"
        try:
            num_running = handle.stats.remote().result()["num_running"]
        except RayActorError:  # it has just died
            continue
