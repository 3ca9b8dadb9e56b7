"""What the gateway notes about a request: its id, a line in the log, and what nobody foresaw.

Neither bodies nor keys get into the log: a line has the key's name, the model's and figures.
"""

import asyncio
import json
import uuid
from typing import TYPE_CHECKING

from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_ray.serve import log
from llava_ray.serve.openai.errors import ErrorReply

if TYPE_CHECKING:
    from llava_ray.serve.gateway.metrics import Metrics
from llava_ray.serve.request_context import _CLIENT_GONE, Visit, _printable


class VisitMiddleware:
    """Gives every request its `Visit` (as `request.state.visit`), and logs it at the end.

    The id is that of the header `x-request-id`, which Serve's proxy makes where the client did not,
    and sends back.
    """

    def __init__(self, app: ASGIApp, metrics: "Metrics | None" = None) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _printable(Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex)
        visit = Visit(request_id, f"{scope['method']} {_printable(scope['path'])}")
        scope["state"] = {**scope.get("state", {}), "visit": visit}

        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.start":
                visit.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except (asyncio.CancelledError, ClientDisconnect, TaskCancelledError) as error:
            visit.note_gone()  # Serve has one exception for those who read, another for the rest
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            reply = visit.report(error)
            if has_begun:
                raise  # half an answer is out: the connection has to break
            await send_reply(reply, send_and_note)
        finally:
            visit.status = visit.status or _CLIENT_GONE
            log.logger.info(str(visit))
            if self._metrics:
                self._metrics.count(visit)


async def send_reply(reply: ErrorReply, send: Send) -> None:
    """Answer a request with an error, from a middleware."""
    headers = [(b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(reply.body).encode()})
