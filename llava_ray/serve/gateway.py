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
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_ray.config import (
    CLIENT_KEY_VARIABLE,
    LimitsConfig,
    ModelConfig,
    PageConfig,
    ServeConfig,
)
from llava_ray.errors import LlavaRayError, RequestError
from llava_ray.serve import console, llava_protocol, openai
from llava_ray.serve import openai_answers as answers
from llava_ray.serve.backend import Answer, Backend
from llava_ray.serve.body import read_body
from llava_ray.serve.directory import Directory
from llava_ray.serve.door import Describe, Door, DoorMiddleware
from llava_ray.serve.fetch import Fetcher
from llava_ray.serve.llava_routes import PATHS, build_llava_app
from llava_ray.serve.metrics import Metrics
from llava_ray.serve.openai_calls import Call, parse_aside
from llava_ray.serve.openai_choices import ChunkEncoder, build_completion
from llava_ray.serve.openai_prompts import parse_completion, parse_detokenize, parse_tokenize
from llava_ray.serve.openapi import describe_api
from llava_ray.serve.visits import Visit, VisitMiddleware
from llava_ray.serve.waiting_room import WaitingRoom
from llava_ray.types import ChatRequest, CompletionRequest


@serve.ingress()
class Gateway:
    """The ingress deployment: the API, and the page if the configuration has it.

    Args:
        config: the application's.
        models: for each model's name the handle of its deployment of `Replica`.
        workers: the handle of the deployment of `Workers`, if any may register.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Mapping[str, DeploymentHandle],
        workers: DeploymentHandle | None = None,
    ) -> None:
        console.set_up()
        self._config = config
        self._models = models
        self._workers = workers

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the gateway's process, after the constructor."""
        api = build_api(self._config, self._models, self._workers)
        if self._config.page:
            self._hand_over_key()
            from llava_ray.serve.page import mount_page

            page = PageConfig(
                gateway_url=None,
                feedback_dir=self._config.feedback_dir,
                moderation=self._config.moderation,
            )
            api = mount_page(api, page)
        return api

    def _hand_over_key(self) -> None:
        """The page is a client like any other: its key comes from the environment."""
        os.environ.pop(CLIENT_KEY_VARIABLE, None)
        if self._config.page_key:
            os.environ[CLIENT_KEY_VARIABLE] = self._config.page_key.get_secret_value()


def build_api(
    config: ServeConfig,
    models: Mapping[str, DeploymentHandle],
    workers: DeploymentHandle | None = None,
) -> FastAPI:
    """Return the HTTP application, on which a page may be mounted.

    Args:
        config: the application's; its limits hold here.
        models: for each model's name a handle on which `chat` and `stats` can be called.
        workers: a handle on `Workers`, if any may register.
    """
    door = Door(config)
    front = Front(config, models, workers, door)
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
    v1.add_api_route("/completions", front.complete, methods=["POST"])
    v1.add_api_route("/tokenize", front.tokenize, methods=["POST"])
    v1.add_api_route("/detokenize", front.detokenize, methods=["POST"])
    v1.add_api_route("/usage", front.show_usage)
    _guard(v1, door, config)
    api = FastAPI(title="LLaVA Ray", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_api_route("/healthz", front.say_alive)
    api.add_api_route("/readyz", front.say_ready)
    api.add_api_route("/openapi.json", front.describe)
    api.mount("/v1", v1)
    for path in ("/tokenize", "/detokenize"):  # where vLLM has them
        api.router.routes.append(Route(path, v1))
    if config.llava_protocol.enabled:
        llava = build_llava_app(config, front.models, workers)
        _guard(llava, door, config, describe=llava_protocol.describe_error)
        api.router.routes += [Route(path, llava) for path in PATHS]
    return api


def _guard(
    api: Starlette, door: Door, config: ServeConfig, describe: Describe = answers.describe_error
) -> None:
    """Let nothing come to the routes of an application but through the door."""
    api.add_middleware(DoorMiddleware, door=door, describe=describe)
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
        self,
        config: ServeConfig,
        models: Mapping[str, DeploymentHandle],
        workers: DeploymentHandle | None,
        door: Door,
    ) -> None:
        self._door = door
        self._limits = config.limits
        self._fetcher = Fetcher(config.limits)
        self._created = int(time.time())
        self._backends = {
            model.name: Backend(model.name, models[model.name], _build_room(model, config.limits))
            for model in config.models
        }
        self.models = Directory(self._backends, workers, config.limits)
        self._sleepers = {model.name for model in config.models if model.min_replicas == 0}

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`"""
        return await self._answer(request, openai.parse, "chatcmpl")

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`"""
        return await self._answer(request, parse_completion, "cmpl")

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`"""
        body = await self._read(request)
        options, asked = await parse_aside(parse_tokenize, body, limits=self._limits)
        tokens = await (await self._choose(options.model)).tokenize(asked)
        return _json(
            {
                "count": len(tokens.ids),
                "max_model_len": tokens.context_length,
                "tokens": tokens.ids,
                "token_strs": tokens.texts if options.return_token_strs else None,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`"""
        options = await parse_aside(parse_detokenize, await self._read(request))
        text = await (await self._choose(options.model)).detokenize(options.tokens)
        return _json({"prompt": text})

    async def _answer(self, request: Request, parse: Callable[..., Call], prefix: str) -> Response:
        visit: Visit = request.state.visit
        body = await self._read(request)
        name = f"{prefix}-{uuid.uuid4().hex}"
        call = await parse_aside(parse, body, limits=self._limits, request_id=name)
        visit.model, visit.completion_id = call.request.model, name
        asked = cap_tokens(call.request, self._limits)
        if isinstance(asked, ChatRequest):
            asked = await self._fetcher.fill(asked)
        backend = await self.models.find(asked.model)
        answer = await backend.start(asked, visit)
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
        names = await self.models.names()
        found = [await self.models.find(name) for name in names]
        models = await asyncio.gather(*map(self._describe, found))
        return _json({"object": "list", "data": models})

    async def get_model(self, name: str) -> Response:
        """`GET /v1/models/{name}`"""
        return _json(await self._describe(await self.models.find(name)))

    async def describe(self) -> Response:
        """`GET /openapi.json`"""
        return _json(describe_api(list(self._backends)))

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

    async def _describe(self, backend: Backend) -> dict[str, Any]:
        is_asleep = backend.name in self._sleepers  # a question would wake it up
        length = None if is_asleep else await backend.find_context_length()
        return answers.describe_model(backend.name, created=self._created, context_length=length)

    async def _choose(self, name: str | None) -> Backend:
        """The model of that name, or the only one."""
        names = await self.models.names()
        if name is None and len(names) > 1:
            raise RequestError(
                f"model is missing, and there are {', '.join(names)}: name one", param="model"
            )
        return await self.models.find(names[0] if name is None else name)

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, max_bytes=self._limits.max_body_bytes)


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


def cap_tokens(
    request: ChatRequest | CompletionRequest, limits: LimitsConfig
) -> ChatRequest | CompletionRequest:
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
            f"there is no {asked}: this API has GET /v1/models, GET /v1/models/{{name}}, "
            "POST /v1/chat/completions, POST /v1/completions, POST /tokenize and POST /detokenize"
        )
        reply = answers.describe_failure(error.status_code, message, code="not_found")
    request.state.visit.error = reply.body["error"]["code"]
    return _json(reply.body, reply.status, {**reply.headers, **(error.headers or {})})
