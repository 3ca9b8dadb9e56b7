"""The state of one HTTP request in the gateway.

`gateway/request_log.py` creates it, routes and backends fill it in, and the request log, the
metrics and the usage accounts read it when the request has ended.
"""

import asyncio
import time
from dataclasses import dataclass, field

from llava_ray.serve import log
from llava_ray.serve.deadline import Deadline
from llava_ray.serve.openai.errors import ErrorReply, describe_failure
from llava_ray.serve.usage import Usage, count_usage
from llava_ray.types import Chunk

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected; it only appears in the log and the metrics."""


@dataclass(slots=True)
class RequestContext:
    """One HTTP request on its way through the gateway.

    Attributes:
        request_id: from the header `x-request-id`, or a random one.
        request_line: method and path.
        started_at: seconds of the monotonic clock.
        first_chunk_s: seconds until the first chunk; None: there was none.
        fetch_s: seconds that fetching images took; None: none were fetched.
        status: HTTP status of the response; 0: not sent yet.
        error: code of the error that ended the request; "" if none did.
        model: the model's name as the client sent it.
        completion_id: id of the completion in the response.
        answers_each: answers generated for each prompt.
        last_chunks: the latest chunk of each answer; it has the token counts so far.
        is_model_known: the model exists, so its name may be a metric's tag.
        key: name of the API key.
        deadline: when the request must have ended.
        idempotency_key: the header `Idempotency-Key`; "" if there is none.
        is_over: set when the request has ended.
    """

    request_id: str
    request_line: str
    started_at: float = field(default_factory=time.monotonic)
    first_chunk_s: float | None = None
    fetch_s: float | None = None
    status: int = 0
    error: str = ""
    model: str = ""
    completion_id: str = ""
    answers_each: int = 1
    last_chunks: dict[int, Chunk] = field(default_factory=dict)
    is_model_known: bool = False
    key: str = ""
    deadline: Deadline = field(default_factory=Deadline)
    idempotency_key: str = ""
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def usage(self) -> Usage:
        """Tokens that the request has used so far."""
        return count_usage(self.last_chunks.values(), answers_each=self.answers_each)

    def note_chunk(self, chunk: Chunk) -> None:
        self.last_chunks[chunk.answer] = chunk

    def note_first_chunk(self) -> None:
        self.first_chunk_s = time.monotonic() - self.started_at

    def note_fetched(self, started_at: float) -> None:
        """Note that the images have been fetched."""
        self.fetch_s = time.monotonic() - started_at

    def note_disconnect(self) -> None:
        """Note that the client disconnected before the end."""
        self.status = CLIENT_CLOSED_REQUEST

    def report(self, error: Exception) -> ErrorReply:
        """Log an unexpected exception and return the response for the client."""
        self.error = "internal_error"
        log.logger.error(f"unexpected error in request {self.request_id}", exc_info=error)
        return describe_failure(
            500,
            f"internal error: the server's log has the details under request {self.request_id}",
            code="internal_error",
        )

    @property
    def total_s(self) -> float:
        return time.monotonic() - self.started_at

    def __str__(self) -> str:
        words = [f"{self.status} {self.request_line}"]
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
    """Return untrusted text, shortened and escaped for one line of a log."""
    return text[:80].encode("unicode_escape").decode()
