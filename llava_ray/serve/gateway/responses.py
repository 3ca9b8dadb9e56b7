"""HTTP bodies of the gateway: reads requests; writes JSON, server-sent events and errors.

`serve/openai/errors.py` decides status and body of an error.
"""

import json
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from llava_ray.errors import EncodingError, LlavaRayError, RequestError, RequestTooLargeError
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
        self,
        answer: BackendResponse,
        encoder: ChunkEncoder,
        context: RequestContext,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._answer, self._encoder, self._context = answer, encoder, context
        no_buffers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        headers = {**no_buffers, **(headers or {})}
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
        allowed = (error.headers or {}).get("Allow", "POST").split(", ")
        message = f"there is no {asked}: use {', '.join(sorted({*allowed} - {'HEAD'}))}"
        reply = describe_failure(405, message, code="method_not_allowed")
    else:
        message = f"there is no {asked}: this API has {_list_routes(request)}"
        reply = describe_failure(error.status_code, message, code="not_found")
    if context := getattr(request.state, "context", None):
        context.error = reply.body["error"]["code"]
    return json_response(reply.body, reply.status, {**reply.headers, **(error.headers or {})})


async def answer_without_v1(request: Request) -> Response:
    """Answer a client whose base URL lacks /v1: 404, with the base URL to set."""
    reply = describe_failure(
        404,
        f"there is no {request.method} {request.url.path[:100]}: set the base URL of the client to "
        f"{find_own_address(request)}/v1",
        code="not_found",
    )
    return json_response(reply.body, reply.status, reply.headers)


def find_own_address(request: Request) -> str:
    """Return the address that the client called, without a slash at its end.

    A proxy in front may have recorded it in `X-Forwarded-Host` and `X-Forwarded-Proto`.
    """
    url = request.base_url
    host = request.headers.get("x-forwarded-host", url.netloc).split(",")[0].strip()
    scheme = request.headers.get("x-forwarded-proto", url.scheme).split(",")[0].strip()
    return f"{scheme}://{host}{url.path.rstrip('/')}"


def _list_routes(request: Request) -> str:
    """Return the methods and paths of the application that has got the request."""
    prefix = request.scope.get("root_path", "")
    return ", ".join(
        f"{'/'.join(sorted({*(route.methods or ())} - {'HEAD'}))} {prefix}{route.path}"
        for route in request.app.routes
        if isinstance(route, APIRoute)
    )


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Return the body of a request, decompressed; reading stops as soon as it is too large.

    Raises:
        RequestTooLargeError: it has, or declares, more than `max_bytes`, compressed or not.
        EncodingError: it is compressed, and not by gzip or deflate.
        RequestError: its compression is damaged.
    """
    too_large = RequestTooLargeError(
        f"the body has more than the {max_bytes:,} bytes allowed: send fewer or smaller images"
    )
    decoder = _find_decoder(request.headers.get("content-encoding", ""))
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    chunks, num_read, num_bytes = [], 0, 0
    async for chunk in request.stream():
        num_read += len(chunk)
        if num_read > max_bytes:
            raise too_large
        chunk = _decode_chunk(decoder, chunk, max_bytes - num_bytes + 1) if decoder else chunk
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise too_large
    if decoder and num_read and not decoder.eof:
        raise RequestError("the compressed body is incomplete: send the whole body")
    return b"".join(chunks)


def _find_decoder(encoding: str) -> Any:
    """Return zlib's decompressor for a `Content-Encoding`; None for a body that needs none."""
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip" | "deflate":
            return zlib.decompressobj(wbits=47)  # reads the headers of gzip and of zlib
    raise EncodingError(
        f"the body has the Content-Encoding {encoding[:40]!r}: send it as gzip, or uncompressed",
        param="Content-Encoding",
    )


def _decode_chunk(decoder: Any, chunk: bytes, max_bytes: int) -> bytes:
    try:
        return decoder.decompress(chunk, max_bytes)
    except zlib.error as error:
        raise RequestError(
            f"the compressed body is damaged ({error}): compress it again, or send it as it is"
        ) from None
