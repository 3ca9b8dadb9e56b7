"""The request log: ASGI middleware that gives a request its id and context, and logs its end.

It also answers unexpected exceptions with a 500. Bodies and API keys are never logged: a line has
the key's name, the model's name, the status, token counts and times.
"""

import asyncio
import json
import uuid

from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_ray.serve import log
from llava_ray.serve.gateway.metrics import Metrics
from llava_ray.serve.openai.errors import ErrorReply
from llava_ray.serve.request_context import CLIENT_CLOSED_REQUEST, RequestContext, to_printable


class RequestLogMiddleware:
    """Gives each request its context (`request.state.context`) and logs it when it has ended.

    The id comes from the header `x-request-id`. Serve's proxy adds that header if the client did
    not send it, and returns it in the response.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = to_printable(Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex)
        context = RequestContext(request_id, f"{scope['method']} {to_printable(scope['path'])}")
        scope["state"] = {**scope.get("state", {}), "context": context}

        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.start":
                context.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except (asyncio.CancelledError, ClientDisconnect, TaskCancelledError) as error:
            context.note_disconnect()  # Serve raises one of these while it reads, another later
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            reply = context.report(error)
            if has_begun:
                raise  # part of the response has been sent: break the connection
            await send_reply(reply, send_and_note)
        finally:
            context.status = context.status or CLIENT_CLOSED_REQUEST
            log.logger.info(str(context))
            if self._metrics:
                self._metrics.count_request(context)


async def send_reply(reply: ErrorReply, send: Send) -> None:
    """BackendResponse a request with an error, from a middleware."""
    headers = [(b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(reply.body).encode()})
