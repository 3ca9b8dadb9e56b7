"""What the gateway notes about a request: its id, a line in the log, and what nobody foresaw.

Neither bodies nor keys get into the log: a line has the key's name, the model's and figures.
"""

import asyncio
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_ray.serve import console
from llava_ray.serve.deadline import Deadline
from llava_ray.serve.openai_answers import ErrorReply, describe_failure
from llava_ray.serve.usage import Usage, count_usage
from llava_ray.types import Chunk

if TYPE_CHECKING:
    from llava_ray.serve.metrics import Metrics

_CLIENT_GONE = 499  # nginx's number for it, in our log only


@dataclass(slots=True)
class Visit:
    """One HTTP request on its way through the gateway."""

    request_id: str
    what: str
    started_at: float = field(default_factory=time.monotonic)
    first_after_s: float | None = None
    fetch_s: float | None = None
    status: int = 0
    error: str = ""
    model: str = ""
    completion_id: str = ""
    answers_each: int = 1
    latest: dict[int, Chunk] = field(default_factory=dict)  # of each answer
    is_model_known: bool = False
    key: str = ""
    deadline: Deadline = field(default_factory=Deadline)
    retry_key: str = ""
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def usage(self) -> Usage:
        """Tokens that its answers have taken so far."""
        return count_usage(self.latest.values(), answers_each=self.answers_each)

    def note_chunk(self, chunk: Chunk) -> None:
        self.latest[chunk.answer] = chunk

    def note_first(self) -> None:
        self.first_after_s = time.monotonic() - self.started_at

    def note_fetched(self, started_at: float) -> None:
        """The pictures behind its addresses are there."""
        self.fetch_s = time.monotonic() - started_at

    def note_gone(self) -> None:
        """The client hung up before the end."""
        self.status = _CLIENT_GONE

    def report(self, error: Exception) -> ErrorReply:
        """Log an error that nobody foresaw, and return what the client is told about it."""
        self.error = "internal_error"
        console.logger.error(f"bug in request {self.request_id}", exc_info=error)
        return describe_failure(
            500,
            f"something broke that should not have; the log of the server says what, under "
            f"request {self.request_id}",
            code="internal_error",
        )

    @property
    def total_s(self) -> float:
        return time.monotonic() - self.started_at

    def __str__(self) -> str:
        words = [f"{self.status} {self.what}"]
        if self.key:
            words.append(f"key {self.key}")
        if self.error:
            words.append(self.error)
        if self.model:
            words.append(_printable(self.model))
        if self.latest:
            words.append(f"{self.usage.num_prompt_tokens}+{self.usage.num_tokens} tokens")
        if self.fetch_s is not None:
            words.append(f"fetched {self.fetch_s:.3f} s")
        if self.first_after_s is not None:
            words.append(f"first {self.first_after_s:.3f} s")
        words.append(f"total {self.total_s:.3f} s")
        return ", ".join(words) + f" [{self.request_id} {self.completion_id}".rstrip() + "]"


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
            console.logger.info(str(visit))
            if self._metrics:
                self._metrics.count(visit)


async def send_reply(reply: ErrorReply, send: Send) -> None:
    """Answer a request with an error, from a middleware."""
    headers = [(b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(reply.body).encode()})


def _printable(text: str) -> str:
    """Return a stranger's text fit for one line of a log."""
    return text[:80].encode("unicode_escape").decode()
