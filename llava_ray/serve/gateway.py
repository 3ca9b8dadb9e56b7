"""The front door: HTTP in, records to the replicas, JSON or server-sent events out. No torch here.

The way of a request: read_body -> openai.parse -> Fetcher.fill -> Backend.start -> Answer
-> completion | events
Errors: `backend.explain` makes ours of Ray's; `openai_answers.describe_error` says their status.
"""

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from llava_ray.config import CLIENT_KEY_VARIABLE, LimitsConfig, ModelConfig, ServeConfig
from llava_ray.errors import LlavaRayError, ModelNotFoundError, RequestError, RequestTooLargeError
from llava_ray.serve import console, openai
from llava_ray.serve import openai_answers as answers
from llava_ray.serve.backend import Answer, Backend
from llava_ray.serve.door import Door, DoorMiddleware
from llava_ray.serve.fetch import Fetcher
from llava_ray.serve.metrics import Metrics
from llava_ray.serve.openai_choices import ChunkEncoder, build_completion
from llava_ray.serve.visits import Visit, VisitMiddleware
from llava_ray.serve.waiting_room import WaitingRoom
from llava_ray.types import ChatRequest

_LARGE_BODY_BYTES = 64 << 10  # parsed in a thread, so that other requests go on meanwhile


@serve.ingress()
class Gateway:
    """The ingress deployment: the API, and the page if the configuration has it.

    Args:
        config: the application's.
        models: for each model's name the handle of its deployment of `Replica`.
    """

    def __init__(self, config: ServeConfig, models: Mapping[str, DeploymentHandle]) -> None:
        console.set_up()
        self._config = config
        self._models = models

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the gateway's process, after the constructor."""
        api = build_api(self._config, self._models)
        if self._config.page:
            self._hand_over_key()
            from llava_ray.serve.page import mount_page

            api = mount_page(api)
        return api

    def _hand_over_key(self) -> None:
        """The page is a client like any other: its key comes from the environment."""
        os.environ.pop(CLIENT_KEY_VARIABLE, None)
        if self._config.page_key:
            os.environ[CLIENT_KEY_VARIABLE] = self._config.page_key.get_secret_value()


def build_api(config: ServeConfig, models: Mapping[str, DeploymentHandle]) -> FastAPI:
    """Return the HTTP application, on which a page may be mounted.

    Args:
        config: the application's; its limits hold here.
        models: for each model's name a handle on which `chat` and `stats` can be called.
    """
    door = Door(config)
    front = Front(config, models, door)
    v1 = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={LlavaRayError: _answer_error, HTTPException: _answer_no_route},
    )
    v1.add_api_route("/models", front.list_models)
    v1.add_api_route("/models/{name:path}", front.get_model)
    v1.add_api_route("/chat/completions", front.chat, methods=["POST"])
    v1.add_api_route("/usage", front.show_usage)
    _guard(v1, door, config)
    api = FastAPI(title="LLaVA Ray", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_api_route("/healthz", front.say_alive)
    api.add_api_route("/readyz", front.say_ready)
    api.mount("/v1", v1)
    return api


def _guard(api: FastAPI, door: Door, config: ServeConfig) -> None:
    """Let nothing come to the routes of an application but through the door."""
    api.add_middleware(DoorMiddleware, door=door)
    api.add_middleware(VisitMiddleware, metrics=Metrics())
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )


class Front:
    """The routes."""

    def __init__(
        self, config: ServeConfig, models: Mapping[str, DeploymentHandle], door: Door
    ) -> None:
        self._door = door
        self._limits = config.limits
        self._fetcher = Fetcher(config.limits)
        self._created = int(time.time())
        self._backends = {
            model.name: Backend(model.name, models[model.name], _build_room(model, config.limits))
            for model in config.models
        }
        self._sleepers = {model.name for model in config.models if model.min_replicas == 0}

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`"""
        visit: Visit = request.state.visit
        body = await read_body(request, max_bytes=self._limits.max_body_bytes)
        call = await self._parse(body, visit)
        answer = await self._find(call.request.model).start(call.request, visit)
        visit.answers_each = call.head.answers_each
        if call.stream:
            encoder = ChunkEncoder(call.form, call.head, include_usage=call.include_usage)
            return EventResponse(answer, encoder, visit)
        try:
            chunks = [chunk async for chunk in answer]
        finally:
            answer.close()
        return _json(build_completion(chunks, call.form, call.head))

    async def list_models(self) -> Response:
        """`GET /v1/models`"""
        models = [answers.describe_model(name, created=self._created) for name in self._backends]
        return _json({"object": "list", "data": models})

    async def get_model(self, name: str) -> Response:
        """`GET /v1/models/{name}`"""
        return _json(answers.describe_model(self._find(name).name, created=self._created))

    async def show_usage(self, request: Request) -> Response:
        """`GET /v1/usage`: of the caller's key, or of all keys for an admin's."""
        return _json(self._door.describe_usage(request.state.visit.key))

    async def say_alive(self) -> Response:
        """`GET /healthz`: this process answers."""
        return _json({"status": "alive"})

    async def say_ready(self) -> Response:
        """`GET /readyz`: every model that is to be up answers; else 503 and what is missing."""
        awake = [backend for name, backend in self._backends.items() if name not in self._sleepers]
        troubles = await asyncio.gather(*(backend.check() for backend in awake))
        states = dict.fromkeys(self._sleepers, "asleep: the first request starts it")
        states |= {
            backend.name: trouble or "ready"
            for backend, trouble in zip(awake, troubles, strict=True)
        }
        is_ready = not any(troubles)
        body = {"status": "ready" if is_ready else "not ready", "models": states}
        return _json(body, 200 if is_ready else 503)

    def _find(self, name: str) -> Backend:
        if name not in self._backends:
            raise ModelNotFoundError(
                f"there is no model {name[:100]!r} here; there is {', '.join(self._backends)}",
                param="model",
            )
        return self._backends[name]

    async def _parse(self, body: bytes, visit: Visit) -> openai.Call:
        options = {"limits": self._limits, "request_id": f"chatcmpl-{uuid.uuid4().hex}"}
        if len(body) > _LARGE_BODY_BYTES:
            call = await asyncio.to_thread(openai.parse, body, **options)
        else:
            call = openai.parse(body, **options)
        visit.model, visit.completion_id = call.request.model, call.request.request_id
        request = cap_tokens(call.request, self._limits)
        return replace(call, request=await self._fetcher.fill(request))


class EventResponse(StreamingResponse):
    """An answer as server-sent events. However it ends, the replica stops working on it."""

    def __init__(self, answer: Answer, encoder: ChunkEncoder, visit: Visit) -> None:
        self._answer, self._encoder, self._visit = answer, encoder, visit
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._encode(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not (self._answer.is_over or self._visit.error):
                self._visit.note_gone()
            self._answer.close()

    async def _encode(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer:
                if events := self._encoder.encode(chunk):
                    yield events
        except LlavaRayError as error:
            self._visit.error = error.code
            yield answers.encode_error(answers.describe_error(error))
        except Exception as error:  # noqa: BLE001 - the status is out: tell the client what we can
            yield answers.encode_error(self._visit.report(error))
        else:
            yield answers.DONE


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Return the body of a request; reading stops where it becomes too large.

    Raises:
        RequestTooLargeError: it has, or says that it has, more than `max_bytes`.
    """
    declared = request.headers.get("content-length", "")
    num_bytes = int(declared) if declared.isascii() and declared.isdigit() else 0
    pieces = []
    if num_bytes <= max_bytes:
        num_bytes = 0
        async for piece in request.stream():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                break
        else:
            return b"".join(pieces)
    raise RequestTooLargeError(
        f"the body has more than the {max_bytes:,} bytes allowed: send fewer or smaller pictures"
    )


def cap_tokens(request: ChatRequest, limits: LimitsConfig) -> ChatRequest:
    """Return the request with as many tokens for its answer as are allowed at most.

    Raises:
        RequestError: it asks for more.
    """
    most, asked = limits.max_tokens, request.sampling.max_tokens
    if most is None:
        return request
    if asked is not None and asked > most:
        raise RequestError(
            f"max_tokens={asked} is more than the {most:,} allowed for an answer: ask for less",
            param="max_tokens",
        )
    return replace(request, sampling=replace(request.sampling, max_tokens=asked or most))


def _build_room(model: ModelConfig, limits: LimitsConfig) -> WaitingRoom:
    max_waiting = model.max_queued_requests
    return WaitingRoom(
        model.name,
        num_seats=model.max_replicas * model.max_ongoing_requests,
        max_waiting=None if max_waiting < 0 else max_waiting,
        max_wait_s=limits.max_wait_s,
    )


def _json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # Escaped to ASCII: a name that is quoted back may not be valid Unicode.
    return Response(json.dumps(body), status, headers, media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LlavaRayError)
    request.state.visit.error = error.code
    reply = answers.describe_error(error)
    return _json(reply.body, reply.status, reply.headers)


async def _answer_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:100]}"
    if error.status_code == 405:
        message = f"there is no {asked}: use {(error.headers or {}).get('Allow', 'POST')}"
        reply = answers.describe_failure(405, message, code="method_not_allowed")
    else:
        message = (
            f"there is no {asked}: this API has GET /v1/models, GET /v1/models/{{name}} and "
            "POST /v1/chat/completions"
        )
        reply = answers.describe_failure(error.status_code, message, code="not_found")
    request.state.visit.error = reply.body["error"]["code"]
    return _json(reply.body, reply.status, {**reply.headers, **(error.headers or {})})
