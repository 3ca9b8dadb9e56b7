"""The gateway over HTTP: real Serve applications, and the unmodified `openai` client."""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from llava_ray.config import LimitsConfig, ModelConfig, ServeConfig
from llava_ray.serve.backends.stream_transport import StreamAddress, StreamSenders
from llava_ray.serve.gateway.deployment import build_api
from llava_ray.types import ChatRequest, Chunk
from tests.support.wait import PATIENCE_S, wait_until, wait_until_ready

pytestmark = pytest.mark.ray

PATH = "/v1/chat/completions"


def make_image(color: str = "red") -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def say(content: Any, model: str = "echo", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_through_the_openai_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**say("Hello there"), max_tokens=2)
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "echo"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 2


def test_a_stream_through_the_openai_client_with_several_images(client: openai.OpenAI) -> None:
    content = [text("Compare"), make_image(), text("with"), make_image("blue"), make_image("green")]
    options: Any = {"stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**say(content), stream=True, **options)
    words = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(words).endswith("(3 images)")
    assert len([word for word in words if word]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.model_dump()["image_tokens"] == 3
    assert all(chunk.usage is None for chunk in chunks)


def test_an_answer_of_the_client_can_be_sent_back_as_a_turn(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [make_image(), text("What is this?")]},
    ]
    first = client.chat.completions.create(model="echo", messages=messages)
    messages += [first.choices[0].message, {"role": "user", "content": "And why?"}]
    second = client.chat.completions.create(model="echo", messages=messages)
    assert second.choices[0].message.content == "And why? (1 images)"
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_the_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="use one of echo, other"):
        client.models.retrieve("a/b")
    with pytest.raises(openai.NotFoundError, match="use one of echo, other") as caught:
        client.chat.completions.create(**say("Hello", model="gpt"))
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_have_a_status_and_a_remedy_and_harm_nobody(
    client: openai.OpenAI, stream: bool
) -> None:
    broken: Any = make_image()
    broken["image_url"]["url"] = broken["image_url"]["url"][:80]
    create: Any = client.chat.completions.create
    for content, code, param, words in (
        ([broken], "invalid_image", "messages[0].content[0].image_url.url", "damaged"),
        ("word " * 5000, "context_length_exceeded", "messages", "5,00. tokens"),
        ("", "invalid_request", "messages[0].content", "is empty"),
        ([make_image()] * 17, "invalid_request", "messages[0].content", "more than the 16"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            create(**say(content), stream=stream)
        assert (caught.value.code, caught.value.param) == (code, param)
        assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.BadRequestError, match="which only repeats the message"):
        create(**say("Hello"), stream=stream, response_format={"type": "json_object"})
    assert create(**say("Still here?")).choices[0].message.content == "Still here? (0 images)"


def test_health_and_unknown_routes(served: str) -> None:
    assert httpx.get(f"{served}/healthz", timeout=PATIENCE_S).json() == {"status": "alive"}
    ready = wait_until_ready(served)
    assert ready["status"] == "ready"
    assert ready["models"] == {"echo": "ready", "other": "ready"}
    for method, path, status, words in (
        ("GET", "/v1/nothing", 404, "POST /v1/chat/completions"),
        ("GET", PATH, 405, "use POST"),
        ("OPTIONS", PATH, 405, "use POST"),
        ("POST", "/v1/models", 405, "use GET"),
    ):
        reply = httpx.request(method, served + path, timeout=PATIENCE_S)
        assert reply.status_code == status
        assert words in reply.json()["error"]["message"]
        assert "access-control-allow-origin" not in reply.headers


def test_the_request_id_comes_back_once(served: str) -> None:
    for path in ("/v1/models", "/v1/nothing"):
        for headers in ({"x-request-id": "mine-1"}, {}):
            reply = httpx.get(served + path, headers=headers, timeout=PATIENCE_S)
            (request_id,) = reply.headers.get_list("x-request-id")
            assert request_id == headers.get("x-request-id", request_id)


def test_the_content_type_is_not_insisted_on(served: str) -> None:
    reply = httpx.post(served + PATH, content=json.dumps(say("Hello")).encode(), timeout=PATIENCE_S)
    assert reply.status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_not_read_to_its_end(served: str, announced: bool) -> None:
    url = httpx.URL(served)
    length = "Content-Length: 99999999999" if announced else "Transfer-Encoding: chunked"
    head = f"POST {PATH} HTTP/1.1\r\nHost: {url.host}\r\n{length}\r\n\r\n"
    piece = b"x" * (1 << 20) if announced else b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    num_sent = 0
    with socket.create_connection((url.host, url.port or 80), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode())
        connection.setblocking(False)
        reply = b""
        deadline = time.monotonic() + PATIENCE_S
        while not reply and time.monotonic() < deadline:
            try:
                reply = connection.recv(1 << 16)
            except BlockingIOError:
                if num_sent < 60:  # MiB; more than is allowed, less than was announced
                    num_sent += send_piece(connection, piece)
    assert reply.startswith(b"HTTP/1.1 413")


def send_piece(connection: socket.socket, piece: bytes) -> int:
    connection.settimeout(PATIENCE_S)
    try:
        connection.sendall(piece)
    except OSError:  # the server has closed its side: its answer can still be read
        return 0
    finally:
        connection.setblocking(False)
    return 1


TROUBLE = LimitsConfig(max_body_bytes=10_000)


@pytest.fixture(scope="module")
def troubled(served: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a second application, whose models behave as the question says.

    `slow` has one replica, which takes eight requests at once; `frail` has two, which tests kill.
    """
    from ray import serve

    from llava_ray.serve.gateway.deployment import Gateway

    folder = tmp_path_factory.mktemp("troubled")

    class Troubled:  # in here, so that Ray sends it to its workers by value
        def __init__(self, folder: Path) -> None:
            self._folder = folder
            self._num_running = 0
            self._senders = StreamSenders()

        async def stats(self) -> dict[str, float]:
            return {"num_running": self._num_running}

        async def chat(self, request: ChatRequest, post: StreamAddress) -> AsyncIterator[Chunk]:
            async with aclosing(self._talk(request)) as chunks:
                async for chunk in self._senders.forward(chunks, post):
                    yield chunk

        async def _talk(self, request: ChatRequest) -> AsyncGenerator[Chunk]:
            from llava_ray.errors import EngineError

            self._num_running += 1
            words = request.messages[0].parts[0].text
            try:
                if words == "die once" and not (self._folder / "died").exists():
                    (self._folder / "died").touch()
                    os._exit(1)
                if words == "bug at once":
                    raise ValueError("secret detail")
                if words == "stall":
                    await asyncio.Event().wait()
                if words == "nothing":
                    return
                for number in range(1, 5):
                    if number == 3 and words == "die later":
                        await asyncio.sleep(1.5)  # what was said is out by then
                        os._exit(1)
                    if number == 3 and words == "bug later":
                        raise ValueError("secret detail")
                    if number == 3 and words == "break later":
                        raise EngineError("the engine broke: try again")
                    reason = "stop" if number == 4 and words != "break off" else None
                    yield Chunk(f"{number} ", reason, number, 9, 0)
                    while number == 2 and words == "linger":
                        yield Chunk("and ", None, number, 9, 0)
                        await asyncio.sleep(0.01)
            finally:
                self._num_running -= 1

    models = {
        name: serve.deployment(
            name=name,
            num_replicas=num_replicas,
            max_ongoing_requests=max_ongoing,
            max_queued_requests=max_queued,
            ray_actor_options={"num_cpus": 0.1},
        )(Troubled).bind(folder)
        for name, num_replicas, max_ongoing, max_queued in (
            ("slow", 1, 8, 1),
            ("frail", 2, 50, 50),
        )
    }
    config = ServeConfig(
        models=[ModelConfig(path=name, engine="echo") for name in models],
        page=False,
        limits=TROUBLE,
    )
    gateway = serve.deployment(
        name="gateway", max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1}
    )(Gateway)
    serve.run(gateway.bind(config, models), name="troubled", route_prefix="/troubled")
    yield f"{served}/troubled"
    serve.delete("troubled")


def ask(url: str, words: str, model: str = "slow", **fields: Any) -> httpx.Response:
    return httpx.post(url + PATH, json=say(words, model, **fields), timeout=PATIENCE_S)


def num_running(model: str = "slow") -> float:
    from ray import serve

    handle: Any = serve.get_deployment_handle(model, app_name="troubled")
    return handle.stats.remote().result()["num_running"]


def wait_until_running(count: int) -> None:
    wait_until(lambda: num_running() == count, f"{count} requests are running")


def test_a_stream_that_its_client_leaves_is_stopped_at_the_replica(troubled: str) -> None:
    body = say("linger", "slow", stream=True)
    with httpx.stream("POST", troubled + PATH, json=body, timeout=PATIENCE_S) as reply:
        lines = reply.iter_lines()
        while "and " not in next(lines):
            pass
        wait_until_running(1)
    wait_until_running(0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", ["linger", "stall"])
def test_a_client_that_hangs_up_while_it_waits_stops_the_replica(
    troubled: str, words: str, stream: bool
) -> None:
    url = httpx.URL(troubled)
    body = json.dumps(say(words, "slow", stream=stream)).encode()
    head = f"POST /troubled{PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(head.encode() + body)
        wait_until_running(1)
    wait_until_running(0)


def test_a_replica_that_dies_before_the_first_token_is_replaced_unseen(troubled: str) -> None:
    reply = ask(troubled, "die once", "frail")
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "1 2 3 4 "


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("die later", "engine_error", "died and is being replaced"),
        ("break later", "engine_error", "the engine broke: try again"),
        ("break off", "engine_error", "stopped in the middle"),
        ("bug later", "internal_error", "the server's log has the details"),
    ],
)
def test_an_error_in_the_middle_of_a_stream_ends_it(
    troubled: str, words: str, code: str, message: str
) -> None:
    with openai.OpenAI(base_url=f"{troubled}/v1", api_key="none", max_retries=0) as client:
        model = "frail" if words == "die later" else "slow"
        stream = client.chat.completions.create(**say(words, model), stream=True)
        heard = [next(stream).choices[0].delta.content for _ in range(3)]
        assert heard == ["", "1 ", "2 "]
        with pytest.raises(openai.APIError, match=message) as caught:
            list(stream)
        assert caught.value.code == code


@pytest.mark.parametrize("words", ["bug at once", "bug later"])
def test_a_bug_is_a_500_with_the_request_id_and_no_traceback(troubled: str, words: str) -> None:
    reply = ask(troubled, words)
    assert reply.status_code == 500
    error = reply.json()["error"]
    assert error["type"] == "server_error"
    assert error["code"] == "internal_error"
    assert reply.headers["x-request-id"] in error["message"]
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text


def test_an_engine_that_says_nothing_is_an_engine_error(troubled: str) -> None:
    reply = ask(troubled, "nothing")
    assert reply.status_code == 500
    assert "ended the response before its first chunk" in reply.json()["error"]["message"]


def test_a_full_model_says_so_at_once_and_when_to_come_back(troubled: str) -> None:
    async def send_many() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=troubled, timeout=PATIENCE_S) as client:
            body = say("linger", "slow", stream=True)
            async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S):
                first = []  # kept: httpx hangs up where the lines are forgotten
                for _ in range(8):
                    call = client.stream("POST", PATH, json=body)
                    stream = await stack.enter_async_context(call)
                    first.append(stream.aiter_lines())
                    await anext(first[-1])
                late = [asyncio.ensure_future(client.post(PATH, json=body)) for _ in range(4)]
                done, _ = await asyncio.wait(late, return_when=asyncio.FIRST_COMPLETED)
                ready = await client.get("/readyz")
                for request in late:
                    request.cancel()
            return [*(task.result() for task in done), ready]

    *replies, ready = asyncio.run(send_many())
    for reply in replies:
        assert reply.status_code == 503
        assert int(reply.headers["Retry-After"]) >= 1
        assert reply.json()["error"]["code"] == "overloaded"
        assert reply.json()["error"]["type"] == "service_unavailable_error"
        assert "busy" in reply.json()["error"]["message"]
    assert ready.status_code == 200  # busy is not broken
    wait_until_running(0)


def test_readiness_says_which_model_is_missing() -> None:
    from ray.serve.exceptions import RayServeException

    class Down:
        """A handle whose replicas cannot be reached."""

        stats = property(lambda self: self)

        def options(self, **_: Any) -> "Down":
            return self

        async def remote(self) -> None:
            raise RayServeException("no replica")

    models = [
        ModelConfig(path="down", engine="echo"),
        ModelConfig(path="asleep", engine="echo", min_replicas=0),
    ]
    handles: Any = {model.name: Down() for model in models}
    transport = httpx.ASGITransport(build_api(ServeConfig(models=models), handles))

    async def ask_both() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/readyz"), await client.get("/healthz")

    ready, alive = asyncio.run(ask_both())
    assert alive.status_code == 200
    assert ready.status_code == 503
    assert ready.json() == {
        "status": "not ready",
        "models": {
            "asleep": "asleep: the first request starts it",
            "down": "not answering: RayServeException",
        },
    }


def test_a_model_that_does_not_wake_says_since_when() -> None:
    class Sleeper:
        """A handle that waits for a replica for which no node has room."""

        chat = property(lambda self: self)

        def options(self, **_: Any) -> "Sleeper":
            return self

        def remote(self, request: ChatRequest) -> "Sleeper":
            return self

        async def __anext__(self) -> Chunk:
            await asyncio.Event().wait()
            raise AssertionError

        def cancel(self) -> None:
            pass

    handles: Any = {"sleeper": Sleeper()}
    config = ServeConfig(models=[ModelConfig(path="sleeper", engine="echo", min_replicas=0)])
    transport = httpx.ASGITransport(build_api(config, handles))

    async def scene() -> tuple[str, str]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = asyncio.create_task(client.post(PATH, json=say("Hello", "sleeper")))
            while (state := await read(client)).startswith("asleep"):
                await asyncio.sleep(0.01)
            asked.cancel()
            await asyncio.wait([asked])
            return state, await read(client)

    async def read(client: httpx.AsyncClient) -> str:
        return (await client.get("/readyz")).json()["models"]["sleeper"]

    waking, asleep = asyncio.run(scene())
    assert waking == "waking: no response for 0 s; `serve status` says what it waits for"
    assert asleep == "asleep: the first request starts it"


def test_limits_are_those_of_the_configuration(troubled: str) -> None:
    reply = ask(troubled, "x" * 20_000)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert "10,000 bytes" in reply.json()["error"]["message"]


def test_the_gateway_holds_no_torch() -> None:
    absent = {"torch", "transformers", "gradio"}
    module = "llava_ray.serve.gateway.deployment"
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []


@pytest.mark.slow
def test_a_hundred_clients_that_hang_up_leave_nothing_running(served: str) -> None:
    from ray import serve

    body = say("on and on", stream=True, max_tokens=4000, ignore_eos=True)

    async def leave(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", PATH, json=body) as reply:
            async for line in reply.aiter_lines():
                if "and" in line:
                    return
        raise AssertionError("the answer ended before its client left")

    async def come() -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=served, timeout=PATIENCE_S, limits=limits) as client:
            await asyncio.gather(*[leave(client) for _ in range(100)])

    asyncio.run(come())
    handle: Any = serve.get_deployment_handle("echo", app_name="app")

    def is_over() -> bool:
        stats = handle.stats.remote().result()
        (usage,) = httpx.get(f"{served}/usage", timeout=PATIENCE_S).json()["data"]
        return (stats["num_running"], stats["cache_tokens_used"], usage["in_flight"]) == (0, 0, 0)

    wait_until(is_over, "no answer is under way")
