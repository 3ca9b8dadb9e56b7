"""One model as the gateway sees it: calls its replicas and translates Ray's errors into ours.

Backend.start -> AdmissionQueue -> Ray Serve handle -> BackendResponse -> the routes
"""

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
_HEALTHY_FOR_S = 10.0  # a model counts as healthy for this long after its last chunk
_CONTEXT_LENGTH_TIMEOUT_S = 1.0


@dataclass
class ReplicaHealth:
    """The last signs of life of a model's replicas; its adapters share this object.

    Attributes:
        pending_since: start times of the requests without a first chunk, the oldest first.
        last_chunk_at: when the last chunk arrived.
        context_length: None until a replica has reported it.
        engine: how its engine computes; empty until a replica has reported it.
    """

    pending_since: list[float] = field(default_factory=list)
    last_chunk_at: float = float("-inf")
    context_length: int | None = None
    engine: dict[str, str] = field(default_factory=dict)


class Backend:
    """A model, as the gateway sees it.

    Args:
        name: the model's name, for messages.
        handle: the Serve handle of its `Replica` deployment.
        queue: where requests wait while all replicas are busy.
        receiver: receives chunks that bypass Ray; None: all chunks come through Ray.

    Attributes:
        parent: the base model's name if this is an adapter, else None.
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
        """Return the backend of an adapter; it shares this model's replicas and queue."""
        adapted = copy.copy(self)
        adapted.name, adapted.parent = f"{self.name}:{adapter}", self.name
        adapted._adapter = adapter
        return adapted

    async def start(
        self, request: Request | CompletionRequest, context: RequestContext
    ) -> "BackendResponse":
        """Return the response once its first chunk has arrived, so that errors set the status.

        If the replica dies before that, another one is tried once.

        Raises:
            LlavaRayError: the request was refused, or no replica could start it.
        """
        context.is_model_known = True
        num_slots = await self._queue.acquire(context.key, request.num_answers)
        try:
            try:
                return await self._start_once(request, context, num_slots)
            except RayActorError:
                log.logger.warning(f"a replica of {self.name!r} died; trying another one")
                return await self._start_once(request, context, num_slots)
        except BaseException as error:
            self._queue.release(num_slots)
            if isinstance(error, RayError | RayServeException):
                raise translate_error(error, self.name) from error
            raise

    async def check(self) -> str:
        """Return why the model does not respond; "" if it does.

        A model that sent a chunk recently, or whose queue is full, counts as healthy.
        """
        if time.monotonic() - self._health.last_chunk_at < _HEALTHY_FOR_S:
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
        """Return the state of a model that scales to zero."""
        if not self._health.pending_since:
            return "asleep: the first request starts it"
        now = time.monotonic()
        if now - self._health.last_chunk_at < _HEALTHY_FOR_S:
            return "ready"
        waited_s = now - max(self._health.pending_since[0], self._health.last_chunk_at)
        return f"waking: no response for {waited_s:.0f} s; `serve status` says what it waits for"

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        """Return the tokens of a prompt; raises a `LlavaRayError`."""
        return await self._ask(self._handle.tokenize.remote(request))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; raises a `LlavaRayError`."""
        return await self._ask(self._handle.detokenize.remote(token_ids))

    async def find_context_length(self) -> int | None:
        """Return the maximum of prompt plus answer tokens; None if no replica reports it."""
        if self._health.context_length is None:
            response = self._handle.get_context_length.remote()
            try:
                self._health.context_length = await asyncio.wait_for(
                    response, _CONTEXT_LENGTH_TIMEOUT_S
                )
            except TimeoutError:
                response.cancel()
            except (RayError, RayServeException):
                pass  # the model is listed without it; /readyz says what is wrong
        return self._health.context_length

    async def describe_engine(self) -> dict[str, str]:
        """Return how a replica's engine computes; empty if none reports it."""
        if not self._health.engine:
            response = self._handle.describe.remote()
            try:
                self._health.engine = await asyncio.wait_for(response, _CONTEXT_LENGTH_TIMEOUT_S)
            except TimeoutError:
                response.cancel()
            except (RayError, RayServeException):
                pass  # /readyz leaves the engine out, and says what is wrong
        return self._health.engine

    async def _ask(self, response: Any) -> Any:
        try:
            return await response
        except (RayError, RayServeException) as error:
            raise translate_error(error, self.name) from error

    async def _start_once(
        self, request: Request | CompletionRequest, context: RequestContext, num_slots: int
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
            raise EngineError(
                f"{self.name!r} ended the response before its first chunk: try again"
            ) from None
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
            self,
            first,
            stream or response,
            context,
            num_answers=request.num_answers,
            num_slots=num_slots,
        )

    def note_alive(self) -> None:
        """Note that a chunk has arrived, so the model is healthy."""
        self._health.last_chunk_at = time.monotonic()

    def end(self, num_slots: int) -> None:
        """Release the slots of a finished response to the next requests."""
        self._queue.release(num_slots)


class BackendResponse:
    """The chunks of a request's answers. Its owner must call `close`, whatever happens.

    Iteration enforces the deadline, and raises errors of ours instead of Ray's.
    """

    def __init__(
        self,
        backend: Backend,
        first: Chunk,
        response: Any,
        context: RequestContext,
        *,
        num_answers: int,
        num_slots: int,
    ) -> None:
        self._backend, self._first, self._response = backend, first, response
        self._context = context
        self._num_open = num_answers
        self._num_slots = num_slots
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
            raise EngineError(
                f"{self._backend.name!r} stopped in the middle of its answer: try again"
            )

    def _note(self, chunk: Chunk) -> Chunk:
        self._context.note_chunk(chunk)
        self._backend.note_alive()
        self._num_open -= chunk.finish_reason is not None
        return chunk

    def close(self) -> None:
        """Cancel what is left of the request on the replica, and release its slots."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self.is_over:
            self.is_over = True
            self._response.cancel()
        self._backend.end(self._num_slots)


def translate_error(error: Exception, model: str) -> Exception:
    """Return our error for an exception of Ray's; an unknown exception is returned as it is."""
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
        return OverloadedError(f"{model!r} is not running; /readyz says why: try again later")
    return error
