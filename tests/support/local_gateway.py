"""The real gateway on a real port of this process, in front of a scripted model.

It runs without Ray, so that a test can configure it freely and inspect it.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn

from llava_ray.config import ModelConfig, ServeConfig
from llava_ray.serve import log
from llava_ray.serve.gateway.deployment import build_api
from llava_ray.serve.gateway.usage_ledger import ExchangeCounts
from llava_ray.types import Chunk, ImagePart, PromptRequest, Request, TextPart

PATH = "/v1/chat/completions"
KEYS = {name: f"lr-{name}-0123456789abcdef" for name in ("alice", "bob", "carol")}


class Talker:
    """Stands for the handle of a model's deployment, and for the model.

    It answers "1 2 3 ". The word "wait" in a question makes it wait until `go` is set before its
    first word, "linger" after it.
    """

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.num_running = self.most_running = self.num_started = 0
        self.order: list[str] = []
        self.last_request: Request | None = None

    chat = stats = property(lambda self: self)
    get_context_length = property(lambda self: _Told(4096))

    def options(self, **_: Any) -> "Talker":
        return self

    def remote(self, request: Request) -> "_Response":
        return _Response(self._talk(request))

    async def _talk(self, request: Request) -> AsyncGenerator[Chunk]:
        self.last_request = request
        if isinstance(request, PromptRequest):
            parts = (TextPart(request.prompt), *request.images)
        else:
            parts = request.messages[-1].parts
        words = "".join(part.text for part in parts if isinstance(part, TextPart))
        num_images = sum(isinstance(part, ImagePart) for part in parts)
        self.num_started += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        self.order.append(words)
        try:
            if words.startswith("wait"):
                await self.go.wait()
            for number in range(1, 4):
                yield Chunk(f"{number} ", "stop" if number == 3 else None, number, 7, num_images)
                if words.startswith("linger"):
                    await self.go.wait()
        finally:
            self.num_running -= 1


class _Told:
    """Stands for a handle's method that returns one value."""

    def __init__(self, value: int) -> None:
        self._value = value

    def remote(self) -> "asyncio.Future[int]":
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        future.set_result(self._value)
        return future


class _Response:
    """Stands for the response of a handle's method, as far as the gateway uses it."""

    def __init__(self, items: AsyncGenerator[Chunk]) -> None:
        self._items = items
        self._task: asyncio.Task[Chunk] | None = None
        self._is_cancelled = False

    def __aiter__(self) -> "_Response":
        return self

    async def __anext__(self) -> Chunk:
        self._task = asyncio.ensure_future(anext(self._items))
        return await asyncio.shield(self._task)

    def cancel(self) -> None:
        if self._task and not self._task.done():
            self._task.cancel()
        elif not self._is_cancelled:
            self._closing = asyncio.ensure_future(self._items.aclose())
        self._is_cancelled = True


class Nearby:
    """A running gateway, and methods that send requests to it."""

    def __init__(self, url: str, talker: Talker, log: list[str]) -> None:
        self.url, self.talker, self.log = url, talker, log
        self._http = httpx.AsyncClient(base_url=url, timeout=60)

    async def say(
        self, words: Any, name: str = "", headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        """Request an answer with the API key of that name."""
        return await self._http.post(PATH, json=body(words, **fields), headers=auth(name, headers))

    @asynccontextmanager
    async def stream(
        self, words: str, name: str = "", headers: dict[str, str] | None = None
    ) -> AsyncIterator[AsyncIterator[Any]]:
        """Yield the events of an answer, whose first word has already arrived."""
        call = self._http.stream(
            "POST", PATH, json=body(words, stream=True), headers=auth(name, headers)
        )
        async with call as reply:
            events = _read_events(reply)
            while not _text(await anext(events)):
                pass
            yield events

    async def get(self, path: str, name: str = "", **headers: str) -> httpx.Response:
        return await self._http.get(path, headers=auth(name, headers))

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self._http.request(method, path, **options)

    async def until(self, condition: Any) -> None:
        while not condition():
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        await self._http.aclose()


def body(words: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "talker", "messages": [{"role": "user", "content": words}], **fields}


def auth(name: str, headers: dict[str, str] | None = None) -> dict[str, str]:
    key = {"Authorization": f"Bearer {KEYS.get(name, name)}"} if name else {}
    return {**key, **(headers or {})}


async def _read_events(reply: httpx.Response) -> AsyncIterator[Any]:
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _text(event: dict[str, Any]) -> str:
    assert "error" not in event, event
    return event["choices"][0]["delta"].get("content", "")


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@asynccontextmanager
async def run_nearby(
    *, model: dict[str, Any] | None = None, exchange: ExchangeCounts | None = None, **config: Any
) -> AsyncIterator[Nearby]:
    """Run a gateway with these fields of `ServeConfig`, and of `ModelConfig` for its one model."""
    models = [ModelConfig(path="talker", engine="echo", **(model or {}))]
    talker, lines = Talker(), _Lines()
    handles: Any = {"talker": talker}
    described = ServeConfig(models=models, page=False, **config)
    api = build_api(described, handles, exchange=exchange)
    options: dict[str, Any] = {"port": 0, "log_level": "error", "lifespan": "off", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(api, **options))
    log.logger.addHandler(lines)
    level, log.logger.level = log.logger.level, logging.INFO
    running = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        nearby = Nearby(f"http://127.0.0.1:{port}", talker, lines.lines)
        async with asyncio.timeout(60):
            yield nearby
        await nearby.close()
    finally:
        talker.go.set()
        server.should_exit = True
        await running
        log.logger.level = level
        log.logger.removeHandler(lines)
