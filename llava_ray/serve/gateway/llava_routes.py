"""The routes of LLaVA's controller, for LLaVA's own clients: its page, `test_message`, its workers.

    body -> protocol.parse_generate -> Backend.start -> Chunk -> protocol.encode_text

They are at the root of the gateway: a client gets the gateway's address in place of a controller's.
Errors that LLaVA's worker or controller would report are JSON objects with an error code and HTTP
status 200. Only an invalid body has an HTTP error status.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_ray.config import ServeConfig
from llava_ray.errors import LlavaRayError, RequestError
from llava_ray.serve.backends.registry import ModelRegistry
from llava_ray.serve.gateway.auth import read_basic_credentials
from llava_ray.serve.gateway.responses import find_own_address, read_body
from llava_ray.serve.llava import protocol
from llava_ray.serve.llava.worker_registry import check_address
from llava_ray.serve.request_context import RequestContext
from llava_ray.types import Chunk, PromptRequest

REPEAT_AFTER_S = 3.0
"""After this time without news the last text is sent again: LLaVA's page gives up after ten seconds
of silence, its controller after five."""

_GENERATE = "/worker_generate_stream"


PATHS = (
    "/list_models",
    "/refresh_all_workers",
    "/get_worker_address",
    "/worker_get_status",
    "/register_worker",
    "/receive_heart_beat",
    _GENERATE,
)


def build_llava_app(
    config: ServeConfig, models: ModelRegistry, workers: DeploymentHandle | None
) -> Starlette:
    """Return the application that serves `PATHS`, to be wrapped in `RequestLogMiddleware`.

    Args:
        config: its `limits` and `llava_protocol` apply.
        models: the models to list and call.
        workers: the handle of the `WorkerRegistry` deployment; None: no workers may register.
    """
    routes = LlavaRoutes(config, models, workers)
    answers = (
        routes.list_models,
        routes.refresh_all_workers,
        routes.get_worker_address,
        routes.get_status,
        routes.register_worker,
        routes.receive_heart_beat,
        routes.generate,
    )
    return Starlette(
        routes=[
            Route(path, answer, methods=["POST"])
            for path, answer in zip(PATHS, answers, strict=True)
        ],
        exception_handlers={LlavaRayError: _answer_error, HTTPException: _answer_no_route},
    )


class LlavaRoutes:
    """The handlers of `PATHS`."""

    def __init__(
        self, config: ServeConfig, models: ModelRegistry, workers: DeploymentHandle | None
    ) -> None:
        self._limits = config.limits
        self._protocol = config.llava_protocol
        self._models = models
        self._workers = workers
        self._num_running = 0

    async def list_models(self, _: Request) -> Response:
        return _json({"models": await self._models.list_names()})

    async def refresh_all_workers(self, _: Request) -> Response:
        if self._workers:
            await self._workers.refresh.remote()
        return _json(None)

    async def get_worker_address(self, request: Request) -> Response:
        """Return the gateway's own address, as it forwards to workers; "" for an unknown model."""
        asked = protocol.parse(protocol.ModelBody, await self._read(request)).model
        is_here = asked in await self._models.list_names()
        return _json({"address": find_address(request, self._protocol.address) if is_here else ""})

    async def get_status(self, _: Request) -> Response:
        """Answer as a worker would: with a speed of 1 for each model."""
        names = await self._models.list_names()
        status = {"model_names": names, "speed": len(names), "queue_length": self._num_running}
        return _json(status)

    async def register_worker(self, request: Request) -> Response:
        """Register a worker; unlike LLaVA's controller, report a failure."""
        body = protocol.parse(protocol.RegisterBody, await self._read(request))
        address = check_address(body.worker_name, self._protocol.workers)
        assert self._workers is not None  # otherwise check_address refuses every address
        status = body.worker_status
        trouble = await self._workers.register.remote(address, body.check_heart_beat, status)
        if trouble:
            raise RequestError(trouble, param="worker_name")
        return _json(None)

    async def receive_heart_beat(self, request: Request) -> Response:
        body = protocol.parse(protocol.HeartBeatBody, await self._read(request))
        address = check_address(body.worker_name, self._protocol.workers)
        assert self._workers is not None
        exists = await self._workers.note_heart_beat.remote(address, body.queue_length)
        return _json({"exist": exists})

    async def generate(self, request: Request) -> Response:
        context: RequestContext = request.state.context
        body = await self._read(request)
        call = await asyncio.to_thread(
            protocol.parse_generate,
            body,
            limits=self._limits,
            request_id=f"llava-{uuid.uuid4().hex}",
        )
        context.model, context.completion_id = call.model, call.request_id
        return TextResponse(self._stream_objects(call, context))

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, max_bytes=self._limits.max_body_bytes)

    async def _stream_objects(
        self, call: PromptRequest, context: RequestContext
    ) -> AsyncGenerator[bytes]:
        """Yield the encoded objects of the response; an error comes last."""
        self._num_running += 1
        is_over, text_so_far = False, call.prompt
        try:
            async with aclosing(_with_pauses(self._answer(call, context))) as chunks:
                async for chunk in chunks:
                    text_so_far += chunk.text if chunk else ""
                    yield protocol.encode_text(text_so_far)
            is_over = True
        except LlavaRayError as error:
            context.error = error.code
            yield protocol.encode_error(error)
        except Exception as error:  # noqa: BLE001 - the status is sent: report it as an object
            message = context.report(error).body["error"]["message"]
            yield protocol.encode_text(message, protocol.FAILED)
        finally:
            self._num_running -= 1
            if not (is_over or context.error):
                context.note_disconnect()

    async def _answer(self, call: PromptRequest, context: RequestContext) -> AsyncGenerator[Chunk]:
        async with context.deadline.enforce():  # the middleware's deadline ended with the status
            backend = await self._models.find(call.model)
            answer = await backend.start(call, context)
        try:
            async for chunk in answer:
                yield chunk
        finally:
            answer.close()


class TextResponse(StreamingResponse):
    """A stream whose source is closed as soon as the client disconnects."""

    def __init__(self, content: AsyncGenerator[bytes]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._content):
            await super().__call__(scope, receive, send)


def find_address(request: Request, configured: str) -> str:
    """Return the address at which the client of a request reaches this gateway.

    This is the configured address if there is one, else the one that the client called, which a
    proxy may have recorded in `X-Forwarded-Host` and `X-Forwarded-Proto`. The client's basic
    credentials are included, because LLaVA's clients can only send those in an address.
    """
    address = configured or find_own_address(request)
    scheme, mark, rest = address.partition("://")
    if login := read_basic_credentials(request.headers):
        rest = f"{quote(login.name, safe='')}:{quote(login.password, safe='')}@{rest}"
    return scheme + mark + rest


async def _with_pauses(chunks: AsyncGenerator[Chunk]) -> AsyncGenerator[Chunk | None]:
    """Yield the chunks, and None whenever there was none for `REPEAT_AFTER_S`."""
    news: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue(maxsize=1)

    async def listen() -> None:
        end: Exception | None = None
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    await news.put(chunk)
        except Exception as error:  # noqa: BLE001 - raised where the stream is read
            end = error
        await news.put(end)

    listening = asyncio.create_task(listen())
    try:
        while True:
            try:
                async with asyncio.timeout(REPEAT_AFTER_S):
                    item = await news.get()
            except TimeoutError:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        listening.cancel()


def _json(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LlavaRayError)
    request.state.context.error = error.code
    body = protocol.encode_error(error)
    if request.url.path.endswith(_GENERATE):  # its clients wait for the end marker
        return Response(body, error.status)
    return Response(body.removesuffix(protocol.END), error.status, media_type="application/json")


async def _answer_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    request.state.context.error = "method_not_allowed"
    message = f"{request.method} is not allowed here: use POST"
    body = {"text": message, "error_code": protocol.FAILED}
    return Response(
        json.dumps(body), error.status_code, error.headers, media_type="application/json"
    )
