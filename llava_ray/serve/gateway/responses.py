"""HTTP bodies of the gateway: reads requests; writes JSON, server-sent events and errors.

`serve/openai/errors.py` decides status and body of an error.
"""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from llava_ray.errors import LlavaRayError, RequestTooLargeError
from llava_ray.serve.backends.replicas import BackendResponse
from llava_ray.serve.openai.errors import DONE, describe_error, describe_failure, encode_error
from llava_ray.serve.openai.streaming import ChunkEncoder
from llava_ray.serve.request_context import RequestContext


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a body as JSON."""
    # json.dumps escapes to ASCII: a name from the request may not be valid Unicode.
    return Response(json.dumps(body), status, headers, media_type="application/json")


class EventResponse(StreamingResponse):
    """A response as server-sent events; however it ends, the replica's work is cancelled."""

    def __init__(
        self, answer: BackendResponse, encoder: ChunkEncoder, context: RequestContext
    ) -> None:
        self._answer, self._encoder, self._context = answer, encoder, context
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._encode(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not (self._answer.is_over or self._context.error):
                self._context.note_disconnect()
            self._answer.close()

    async def _encode(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer:
                if events := self._encoder.encode(chunk):
                    yield events
        except LlavaRayError as error:
            self._context.error = error.code
            yield encode_error(describe_error(error))
        except Exception as error:  # noqa: BLE001 - the status is sent: report it as an event
            yield encode_error(self._context.report(error))
        else:
            yield DONE


async def answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LlavaRayError)
    request.state.context.error = error.code
    reply = describe_error(error)
    return json_response(reply.body, reply.status, reply.headers)


async def answer_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:100]}"
    if error.status_code == 405:
        message = f"there is no {asked}: use {(error.headers or {}).get('Allow', 'POST')}"
        reply = describe_failure(405, message, code="method_not_allowed")
    else:
        message = f"there is no {asked}: this API has {_list_routes(request)}"
        reply = describe_failure(error.status_code, message, code="not_found")
    request.state.context.error = reply.body["error"]["code"]
    return json_response(reply.body, reply.status, {**reply.headers, **(error.headers or {})})


def _list_routes(request: Request) -> str:
    """Return the methods and paths of the application that has got the request."""
    prefix = request.scope.get("root_path", "")
    return ", ".join(
        f"{'/'.join(sorted(route.methods))} {prefix}{route.path}"
        for route in request.app.routes
        if isinstance(route, APIRoute)
    )


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Return the body of a request; reading stops as soon as it is too large.

    Raises:
        RequestTooLargeError: it has, or declares, more than `max_bytes`.
    """
    declared = request.headers.get("content-length", "")
    num_bytes = int(declared) if declared.isascii() and declared.isdigit() else 0
    chunks = []
    if num_bytes <= max_bytes:
        num_bytes = 0
        async for chunk in request.stream():
            chunks.append(chunk)
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                break
        else:
            return b"".join(chunks)
    raise RequestTooLargeError(
        f"the body has more than the {max_bytes:,} bytes allowed: send fewer or smaller images"
    )
