"""One replica of one model: the worker that Ray Serve starts, watches and multiplies.

What it does with a request is in `engine/chat.py` and `engine/chat.py`.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from llava_ray.config import LimitsConfig, ModelConfig
from llava_ray.engine.chat import chat, complete, tokenize
from llava_ray.errors import EngineError
from llava_ray.serve import log
from llava_ray.serve.backends.stream_transport import StreamAddress, StreamSenders
from llava_ray.serve.deadline import Deadline
from llava_ray.serve.replica.metrics import ReplicaMetrics
from llava_ray.types import (
    Chunk,
    CompletionRequest,
    Message,
    Request,
    TextPart,
    TokenizeRequest,
    Tokens,
)

DECODES_AT_ONCE = 2
"""Conversations whose images are decoded at the same time; bounds the memory that takes."""

_SHARES = 3
"""No stream takes more than one of so many shares of the messages, which its reader does not miss:
each takes time of the cores that compute the answer."""

FAILED_CHECKS = 3
"""Checks of health in a row after which Serve gives a replica up."""


class Replica:
    """Holds one engine and answers the chats that Serve routes to it."""

    def __init__(self, model: ModelConfig, limits: LimitsConfig) -> None:
        from llava_ray.engine.factory import load_engine

        log.set_up(in_replica=True)
        log.logger.info(
            f"loading {model.name!r} from {model.path!r} with the {model.engine} engine"
        )
        started = time.monotonic()
        self._metrics = ReplicaMetrics()
        self._engine = load_engine(model, note_images=self._metrics.note_images)
        self._limits = limits
        self._messages_per_s = model.messages_per_s
        self._senders = StreamSenders()
        self._num_streams = 0
        self._num_failed_checks = 0
        self._deadlines: set[Deadline] = set()  # of what is being answered
        self._decoders = ThreadPoolExecutor(DECODES_AT_ONCE, thread_name_prefix="decode")
        hello = Message("user", (TextPart("Hello"),))
        self._engine.template.render([hello])  # compiled before the first user waits for it
        log.logger.info(f"{model.name!r} is ready after {time.monotonic() - started:.1f} s")

    async def chat(
        self, request: Request, address: StreamAddress | None = None
    ) -> AsyncGenerator[Chunk]:
        """Stream the answer; leaving the iterator aborts the request in the engine.

        Args:
            request: what to answer.
            address: where all chunks but the first may be sent instead of being yielded.
        """
        answer = chat(
            self._engine,
            request,
            limits=self._limits,
            executor=self._decoders,
            note_decode=self._metrics.note_decode,
            note_render=self._metrics.note_render,
        )
        async with aclosing(self._send(answer, request)) as chunks:
            async for chunk in self._senders.forward(chunks, address):
                yield chunk

    async def complete(
        self, request: CompletionRequest, address: StreamAddress | None = None
    ) -> AsyncGenerator[Chunk]:
        """Stream the answers to plain prompts, as `chat` does."""
        answers = complete(self._engine, request)
        async with aclosing(self._send(answers, request)) as chunks:
            async for chunk in self._senders.forward(chunks, address):
                yield chunk

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        return await tokenize(self._engine, request, limits=self._limits, executor=self._decoders)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._engine.detokenize(token_ids)

    async def get_context_length(self) -> int:
        return self._engine.context_length

    async def _send(
        self, answer: AsyncGenerator[Chunk], request: Request | CompletionRequest
    ) -> AsyncGenerator[Chunk]:
        """Yield the pieces of an answer that are sent, and measure them."""
        deadline = Deadline()
        self._deadlines.add(deadline)
        try:
            with self._metrics.track(request) as progress:
                async with aclosing(self._coalesce(answer, request.num_answers)) as pieces:
                    async for piece in deadline.watch(pieces):
                        progress.note_chunk(piece)
                        yield piece
        finally:
            self._deadlines.discard(deadline)

    async def _coalesce(
        self, answer: AsyncGenerator[Chunk], num_answers: int
    ) -> AsyncGenerator[Chunk]:
        """Yield an answer, joined to the pieces that are sent.

        The first piece goes out at once. Later ones are joined while the replica as a whole would
        send more than `messages_per_s`, or this answer alone more than a share of them.
        """
        self._num_streams += num_answers
        held: dict[int, Chunk] = {}
        sent_at: dict[int, float] = {}
        try:
            async with aclosing(answer) as chunks:
                async for chunk in chunks:
                    if before := held.pop(chunk.answer, None):
                        chunk = before.join(chunk)
                    now = time.monotonic()
                    pause_s = max(_SHARES, self._num_streams) / self._messages_per_s
                    is_due = now - sent_at.get(chunk.answer, float("-inf")) >= pause_s
                    if chunk.finish_reason or (is_due and (chunk.text or chunk.logprobs)):
                        yield chunk
                        sent_at[chunk.answer] = now
                    else:
                        held[chunk.answer] = chunk
        finally:
            self._num_streams -= num_answers

    async def check_health(self) -> None:
        """Called by Serve; raises when the engine does not work, and Serve replaces the replica.

        Serve lets it finish what it has begun. What a broken engine has begun ends with an error,
        or the next replica would wait for the room of this one.
        """
        self._metrics.note_stats(self._engine.stats())
        try:
            await self._engine.check()
        except Exception:
            self._num_failed_checks += 1
            if self._num_failed_checks >= FAILED_CHECKS:
                for deadline in self._deadlines:
                    deadline.expire_now(
                        EngineError("the engine does not work and is being replaced: try again")
                    )
            raise
        self._num_failed_checks = 0

    async def stats(self) -> dict[str, float]:
        return self._engine.stats()
