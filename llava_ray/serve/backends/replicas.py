"""One model behind the gateway: calls its replicas, and makes our errors of Ray's."""

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from llava_ray.errors import EngineError, LlavaRayError, OverloadedError
from llava_ray.serve import log
from llava_ray.serve.backends.admission_queue import AdmissionQueue
from llava_ray.serve.backends.stream_transport import StreamReceiver
from llava_ray.serve.request_context import RequestContext
from llava_ray.types import Chunk, CompletionRequest, Request, TokenizeRequest, Tokens

READY_TIMEOUT_S = 3.0
_FRESH_S = 10.0
_QUICK_S = 1.0


@dataclass
class ReplicaHealth:
    """What was heard of a model's replicas, through the model or any of its adapters.

    Attributes:
        pending_since: of requests of which nothing has been heard yet, the oldest first.
        last_chunk_at: when the last chunk came.
        context_length: once a replica has told it.
    """

    pending_since: list[float] = field(default_factory=list)
    last_chunk_at: float = float("-inf")
    context_length: int | None = None


class Backend:
    """A model, as the gateway sees it.

    Args:
        name: the model's, for messages.
        handle: of its deployment of `Replica`.
        queue: where requests wait while its replicas are busy.
        receiver: where replicas may send chunks past Ray; None: they do not.

    Attributes:
        parent: the name of the model that this is an adapter of; None: it is none.
    """

    parent: str | None = None
    _adapter = ""

    def __init__(
        self,
        name: str,
        handle: DeploymentHandle,
        queue: AdmissionQueue,
        receiver: StreamReceiver | None = None,
    ) -> None:
        self.name = name
        self._receiver = receiver
        self._queue = queue
        self._handle = handle
        self._stream_handle = handle.options(stream=True)
        self._health = ReplicaHealth()

    def with_adapter(self, adapter: str) -> "Backend":
        """Return one of this model's adapters: the same replicas, the same queue."""
        adapted = copy.copy(self)
        adapted.name, adapted.parent = f"{self.name}:{adapter}", self.name
        adapted._adapter = adapter
        return adapted

    async def start(
        self, request: Request | CompletionRequest, context: RequestContext
    ) -> "BackendResponse":
        """Return the answer once its first chunk is there, so that an error still has a status.

        A replica that dies before that is replaced by another one, once.

        Raises:
            LlavaRayError: the request was refused, or no replica could begin.
        """
        context.is_model_known = True
        await self._queue.acquire(context.key)
        try:
            try:
                return await self._start_once(request, context)
            except RayActorError:
                log.logger.warning(f"a replica of {self.name!r} died; asking another one")
                return await self._start_once(request, context)
        except BaseException as error:
            self._queue.release()
            if isinstance(error, RayError | RayServeException):
                raise translate_error(error, self.name) from error
            raise

    async def check(self) -> str:
        """Return what keeps the model from answering, or nothing if it answers.

        A model that sent a chunk a moment ago, or is too busy to be asked, is well.
        """
        if time.monotonic() - self._health.last_chunk_at < _FRESH_S:
            return ""
        response = self._handle.stats.remote()
        try:
            await asyncio.wait_for(response, READY_TIMEOUT_S)
        except TimeoutError:
            response.cancel()
            return f"loading or stuck: no answer within {READY_TIMEOUT_S:g} s"
        except BackPressureError:
            return ""
        except (RayError, RayServeException) as error:
            return f"not answering: {type(error).__name__}"
        return ""

    def describe_idle_state(self) -> str:
        """Return how a model is that nobody keeps awake."""
        if not self._health.pending_since:
            return "asleep: the first request starts it"
        now = time.monotonic()
        if now - self._health.last_chunk_at < _FRESH_S:
            return "ready"
        waited_s = now - max(self._health.pending_since[0], self._health.last_chunk_at)
        return f"waking: no answer for {waited_s:.0f} s; `serve status` says what it waits for"

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        """Return the tokens of a prompt; raises a `LlavaRayError`."""
        return await self._ask(self._handle.tokenize.remote(request))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; raises a `LlavaRayError`."""
        return await self._ask(self._handle.detokenize.remote(token_ids))

    async def find_context_length(self) -> int | None:
        """Return how long prompt and answer may be; None if no replica says so at once."""
        if self._health.context_length is None:
            response = self._handle.get_context_length.remote()
            try:
                self._health.context_length = await asyncio.wait_for(response, _QUICK_S)
            except TimeoutError:
                response.cancel()
            except (RayError, RayServeException):
                pass  # told without it; /readyz says what is wrong
        return self._health.context_length

    async def _ask(self, response: Any) -> Any:
        try:
            return await response
        except (RayError, RayServeException) as error:
            raise translate_error(error, self.name) from error

    async def _start_once(
        self, request: Request | CompletionRequest, context: RequestContext
    ) -> "BackendResponse":
        is_completion = isinstance(request, CompletionRequest)
        method = self._stream_handle.complete if is_completion else self._stream_handle.chat
        stream = await self._receiver.register() if self._receiver else None
        address = [stream.address] if stream else []
        response: Any = method.remote(replace(request, adapter=self._adapter), *address)
        pending_since = time.monotonic()
        self._health.pending_since.append(pending_since)
        try:
            first = await anext(response)
        except StopAsyncIteration:
            raise EngineError(f"{self.name!r} ended before it said anything: try again") from None
        except BaseException:
            response.cancel()
            if stream:
                stream.discard()
            raise
        finally:
            self._health.pending_since.remove(pending_since)
        context.note_first_chunk()
        if stream:
            stream.follow(first, response, num_answers=request.num_answers)
        return BackendResponse(
            self, first, stream or response, context, num_answers=request.num_answers
        )

    def note_alive(self) -> None:
        """A chunk came: the model is well."""
        self._health.last_chunk_at = time.monotonic()

    def end(self) -> None:
        """An answer is over: the next request may have its seat."""
        self._queue.release()


class BackendResponse:
    """The answers to one request, as chunks. Whoever holds it calls `close`, whatever happened."""

    def __init__(
        self,
        backend: Backend,
        first: Chunk,
        response: Any,
        context: RequestContext,
        *,
        num_answers: int,
    ) -> None:
        self._backend, self._first, self._response = backend, first, response
        self._context = context
        self._num_open = num_answers
        self._is_closed = False
        self.is_over = False

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            yield self._note(self._first)
            async for chunk in self._context.deadline.watch(self._response):
                yield self._note(chunk)
            self.is_over = True
        except (RayError, RayServeException) as error:
            raise translate_error(error, self._backend.name) from error
        if self._num_open:
            raise EngineError(f"{self._backend.name!r} broke off in the middle: try again")

    def _note(self, chunk: Chunk) -> Chunk:
        self._context.note_chunk(chunk)
        self._backend.note_alive()
        self._num_open -= chunk.finish_reason is not None
        return chunk

    def close(self) -> None:
        """Stop the replica's work on it, if there is any left, and give up the seat."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self.is_over:
            self.is_over = True
            self._response.cancel()
        self._backend.end()


def translate_error(error: Exception, model: str) -> Exception:
    """Return our error for one that Ray raised; one that nobody foresaw comes back as it is."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, LlavaRayError):
        return cause
    if isinstance(cause, BackPressureError):
        return OverloadedError(
            f"all replicas of {model!r} are busy and their queue is full: try again in a moment"
        )
    if isinstance(cause, RayActorError):
        return EngineError(
            f"the replica of {model!r} that was answering died and is being replaced: try again"
        )
    if isinstance(cause, TaskCancelledError):
        return OverloadedError(f"the replica of {model!r} was stopped: try again in a moment")
    if isinstance(cause, RayServeException):
        return OverloadedError(f"{model!r} is not up; /readyz says why: try again later")
    return error
