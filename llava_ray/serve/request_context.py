"""One HTTP request on its way through the gateway: what the log, metrics and usage need."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava_ray.serve import log
from llava_ray.serve.deadline import Deadline
from llava_ray.serve.openai.errors import ErrorReply, describe_failure
from llava_ray.types import Chunk, Usage, count_usage

if TYPE_CHECKING:
    pass


CLIENT_CLOSED_REQUEST = 499  # nginx's number for it, in our log only


@dataclass(slots=True)
class RequestContext:
    """One HTTP request on its way through the gateway."""

    request_id: str
    what: str
    started_at: float = field(default_factory=time.monotonic)
    first_chunk_s: float | None = None
    fetch_s: float | None = None
    status: int = 0
    error: str = ""
    model: str = ""
    completion_id: str = ""
    answers_each: int = 1
    last_chunks: dict[int, Chunk] = field(default_factory=dict)  # of each answer
    is_model_known: bool = False
    key: str = ""
    deadline: Deadline = field(default_factory=Deadline)
    idempotency_key: str = ""
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def usage(self) -> Usage:
        """Tokens that its answers have taken so far."""
        return count_usage(self.last_chunks.values(), answers_each=self.answers_each)

    def note_chunk(self, chunk: Chunk) -> None:
        self.last_chunks[chunk.answer] = chunk

    def note_first_chunk(self) -> None:
        self.first_chunk_s = time.monotonic() - self.started_at

    def note_fetched(self, started_at: float) -> None:
        """The images behind its addresses are there."""
        self.fetch_s = time.monotonic() - started_at

    def note_disconnect(self) -> None:
        """The client hung up before the end."""
        self.status = CLIENT_CLOSED_REQUEST

    def report(self, error: Exception) -> ErrorReply:
        """Log an error that nobody foresaw, and return what the client is told about it."""
        self.error = "internal_error"
        log.logger.error(f"bug in request {self.request_id}", exc_info=error)
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
            words.append(to_printable(self.model))
        if self.last_chunks:
            words.append(f"{self.usage.num_prompt_tokens}+{self.usage.num_tokens} tokens")
        if self.fetch_s is not None:
            words.append(f"fetched {self.fetch_s:.3f} s")
        if self.first_chunk_s is not None:
            words.append(f"first {self.first_chunk_s:.3f} s")
        words.append(f"total {self.total_s:.3f} s")
        return ", ".join(words) + f" [{self.request_id} {self.completion_id}".rstrip() + "]"


def to_printable(text: str) -> str:
    """Return a stranger's text fit for one line of a log."""
    return text[:80].encode("unicode_escape").decode()
