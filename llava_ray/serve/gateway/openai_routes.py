"""The routes of the OpenAI API, and of health checks and usage.

read_body -> parse_chat -> Fetcher.fetch_images -> Backend.start -> BackendResponse
-> build_completion (JSON) | EventResponse (server-sent events)
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from ray.serve.handle import DeploymentHandle

from llava_ray.config import LimitsConfig, ModelConfig, ServeConfig
from llava_ray.errors import RequestError
from llava_ray.serve.backends.admission_queue import AdmissionQueue
from llava_ray.serve.backends.registry import ModelRegistry
from llava_ray.serve.backends.replicas import Backend, BackendResponse
from llava_ray.serve.backends.stream_transport import StreamReceiver
from llava_ray.serve.fetch.client import Fetcher
from llava_ray.serve.gateway.auth import AccessControl
from llava_ray.serve.gateway.metrics import Metrics
from llava_ray.serve.gateway.responses import EventResponse, json_response, read_body
from llava_ray.serve.openai.call import ApiCall, parse_body
from llava_ray.serve.openai.chat import parse_chat
from llava_ray.serve.openai.completions import parse_completion, parse_detokenize, parse_tokenize
from llava_ray.serve.openai.errors import describe_model
from llava_ray.serve.openai.fields import IGNORED_HEADER, write_ignored
from llava_ray.serve.openai.openapi import describe_api
from llava_ray.serve.openai.streaming import ChunkEncoder, build_completion
from llava_ray.serve.request_context import RequestContext
from llava_ray.types import ChatRequest, CompletionRequest


class OpenAIRoutes:
    """The handlers of the routes; `gateway/deployment.py` gives them their paths."""

    def __init__(
        self,
        config: ServeConfig,
        models: Mapping[str, DeploymentHandle],
        workers: DeploymentHandle | None,
        access: AccessControl,
        metrics: Metrics,
        receiver: StreamReceiver | None = None,
    ) -> None:
        self._access = access
        self._limits = config.limits
        self._fetcher = Fetcher(config.limits)
        self._created = int(time.time())
        self._backends = {
            model.name: Backend(
                model.name,
                models[model.name],
                _build_queue(model, config.limits, metrics),
                receiver,
            )
            for model in config.models
        }
        adapted = [
            self._backends[model.name].with_adapter(adapter)
            for model in config.models
            for adapter in model.adapters
        ]
        own = self._backends | {each.name: each for each in adapted}
        self.models = ModelRegistry(own, workers, config.limits)
        self._scale_to_zero = {model.name for model in config.models if model.min_replicas == 0}

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`"""
        return await self._answer(request, parse_chat, "chatcmpl")

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`"""
        return await self._answer(request, parse_completion, "cmpl")

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`"""
        body = await self._read(request)
        call = await parse_body(parse_tokenize, body, limits=self._limits)
        tokens = await (await self._find_backend(call.options.model)).tokenize(call.request)
        return json_response(
            {
                "count": len(tokens.ids),
                "max_model_len": tokens.context_length,
                "tokens": tokens.ids,
                "token_strs": tokens.texts if call.options.return_token_strs else None,
            },
            headers=describe_ignored(call.ignored),
        )

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`"""
        body = await self._read(request)
        options, ignored = await parse_body(parse_detokenize, body, limits=self._limits)
        text = await (await self._find_backend(options.model)).detokenize(options.tokens)
        return json_response({"prompt": text}, headers=describe_ignored(ignored))

    async def _answer(
        self, http_request: Request, parse: Callable[..., ApiCall], prefix: str
    ) -> Response:
        """Answer a chat or a plain completion; each line is a stage of the request."""
        context: RequestContext = http_request.state.context
        body = await self._read(http_request)
        completion_id = f"{prefix}-{uuid.uuid4().hex}"
        call = await parse_body(parse, body, limits=self._limits, request_id=completion_id)
        context.model, context.completion_id = call.request.model, completion_id
        response = await self._start(call, context)
        context.answers_each = call.meta.answers_each
        headers = describe_ignored(call.ignored)
        if call.stream:
            encoder = ChunkEncoder(
                call.formatter,
                call.meta,
                include_usage=call.include_usage,
                continuous_usage=call.continuous_usage,
            )
            return EventResponse(response, encoder, context, headers)
        try:
            chunks = [chunk async for chunk in response]
        finally:
            response.close()
        body = build_completion(chunks, call.formatter, call.meta)
        return json_response(body, headers=headers)

    async def _start(self, call: ApiCall, context: RequestContext) -> BackendResponse:
        """Return the answers to a request; they have begun."""
        try:
            request = cap_tokens(call.request, self._limits)
            if isinstance(request, ChatRequest):
                request = await self._fetch_images(request, context)
            backend = await self.models.find(request.model)
            return await backend.start(request, context)
        except RequestError as error:
            raise call.blame(error) from error

    async def _fetch_images(self, request: ChatRequest, context: RequestContext) -> ChatRequest:
        started_at = time.monotonic()
        fetched = await self._fetcher.fetch_images(request)
        if fetched is not request:
            context.note_fetched(started_at)
        return fetched

    async def list_models(self) -> Response:
        """`GET /v1/models`"""
        names = await self.models.list_names()
        found = [await self.models.find(name) for name in names]
        models = await asyncio.gather(*map(self._describe_model, found))
        return json_response({"object": "list", "data": models})

    async def get_model(self, name: str) -> Response:
        """`GET /v1/models/{name}`"""
        return json_response(await self._describe_model(await self.models.find(name)))

    async def show_openapi(self) -> Response:
        """`GET /openapi.json`"""
        document = describe_api(list(self._backends), unknown_fields=self._limits.unknown_fields)
        return json_response(document)

    async def show_usage(self, request: Request) -> Response:
        """`GET /usage`: the usage of the caller's key, or of all keys for an admin key."""
        return json_response(await self._access.describe_usage(request.state.context.key))

    async def check_liveness(self) -> Response:
        """`GET /healthz`: this process is alive."""
        return json_response({"status": "alive"})

    async def check_readiness(self) -> Response:
        """`GET /readyz`: 200 if all models that must run respond, else 503 and which do not.

        `engines` says on which device, and how, each model that responds computes.
        """
        awake = [
            backend for name, backend in self._backends.items() if name not in self._scale_to_zero
        ]
        troubles = await asyncio.gather(*(backend.check() for backend in awake))
        states = {name: self._backends[name].describe_idle_state() for name in self._scale_to_zero}
        states |= {
            backend.name: trouble or "ready"
            for backend, trouble in zip(awake, troubles, strict=True)
        }
        is_ready = not any(troubles)
        body = {"status": "ready" if is_ready else "not ready", "models": states}
        ready = [each for each in awake if states[each.name] == "ready"]
        described = await asyncio.gather(*(backend.describe_engine() for backend in ready))
        engines = {each.name: text for each, text in zip(ready, described, strict=True) if text}
        if engines:
            body["engines"] = engines
        return json_response(body, 200 if is_ready else 503)

    async def _describe_model(self, backend: Backend) -> dict[str, Any]:
        is_asleep = (
            backend.parent or backend.name
        ) in self._scale_to_zero  # a call would start a replica
        return describe_model(
            backend.name,
            created=self._created,
            context_length=None if is_asleep else await backend.find_context_length(),
            parent=backend.parent,
        )

    async def _find_backend(self, name: str | None) -> Backend:
        """Return the model of that name; None: the only model there is."""
        names = await self.models.list_names()
        if name is None and len(names) > 1:
            raise RequestError(f"model is missing: name one of {', '.join(names)}", param="model")
        return await self.models.find(names[0] if name is None else name)

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, max_bytes=self._limits.max_body_bytes)


def describe_ignored(names: Sequence[str]) -> dict[str, str]:
    """Return the header that names the fields of a request which have no effect."""
    return {IGNORED_HEADER: write_ignored(names)} if names else {}


def cap_tokens(
    request: ChatRequest | CompletionRequest, limits: LimitsConfig
) -> ChatRequest | CompletionRequest:
    """Return the request with `max_tokens` no higher than the limit.

    Raises:
        RequestError: it asks for more than the limit, and is not to be cut.
    """
    most, asked = limits.max_tokens, request.sampling.max_tokens
    if most is None:
        return request
    if asked is not None and asked > most and not request.sampling.may_cut:
        raise RequestError(
            f"max_tokens={asked} is more than the {most:,} allowed for an answer: ask for fewer",
            param="max_tokens",
        )
    capped = min(asked or most, most)
    return replace(request, sampling=replace(request.sampling, max_tokens=capped))


def _build_queue(model: ModelConfig, limits: LimitsConfig, metrics: Metrics) -> AdmissionQueue:
    max_waiting = model.max_queued_requests
    return AdmissionQueue(
        model.name,
        num_slots=model.max_replicas * model.max_ongoing_requests,
        max_waiting=None if max_waiting < 0 else max_waiting,
        max_wait_s=limits.max_wait_s,
        note_waiting=partial(metrics.note_queued, model.name),
    )
