"""One replica of one model: the deployment that Ray Serve starts, health-checks and scales.

It turns a request into chunks with `engine/chat.py`; `stream_transport.py` carries them back.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from llava_ray.config import LimitsConfig, ModelConfig
from llava_ray.engine.chat import chat, complete, tokenize
from llava_ray.errors import EngineError
from llava_ray.model.fingerprint import make_fingerprint
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
"""Conversations whose images are decoded at the same time; this bounds memory."""

_MIN_SHARES = 3
"""A single stream may use at most 1/3 of `messages_per_s`. Its reader does not notice, and each
message costs CPU time that the model needs."""

FAILED_CHECKS = 3
"""Serve replaces a replica after this many failed health checks in a row."""


class Replica:
    """Holds one engine and answers the requests that Serve routes to it."""

    def __init__(self, model: ModelConfig, limits: LimitsConfig) -> None:
        from llava_ray.engine.factory import load_engine

        log.set_up(in_replica=True)
        log.logger.info(
            f"loading {model.name!r} from {model.path!r} with the {model.engine} engine"
        )
        started = time.monotonic()
        self._metrics = ReplicaMetrics()
        self._engine = load_engine(model, note_images=self._metrics.note_images)
        self._fingerprints = {
            adapter: make_fingerprint(model, adapter) for adapter in ("", *model.adapters)
        }
        self._limits = limits
        self._messages_per_s = model.messages_per_s
        self._senders = StreamSenders()
        self._num_streams = 0
        self._num_failed_checks = 0
        self._deadlines: set[Deadline] = set()  # of the requests in flight
        self._decoders = ThreadPoolExecutor(DECODES_AT_ONCE, thread_name_prefix="decode")
        hello = Message("user", (TextPart("Hello"),))
        self._engine.template.render([hello])  # compiles it before the first request
        described = self._engine.describe()
        self._metrics.note_engine(described)
        log.logger.info(
            f"{model.name!r} is ready after {time.monotonic() - started:.1f} s: "
            + ", ".join(f"{name} {value}" for name, value in described.items())
        )

    async def chat(
        self, request: Request, address: StreamAddress | None = None
    ) -> AsyncGenerator[Chunk]:
        """Stream the answer; closing the iterator aborts the request in the engine.

        Args:
            request: the conversation or prompt to answer.
            address: the gateway's address, to which all chunks but the first are sent if it can
                be reached; None: all chunks are yielded.
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
        """Stream the answers to plain prompts; see `chat`."""
        answers = complete(self._engine, request)
        async with aclosing(self._send(answers, request)) as chunks:
            async for chunk in self._senders.forward(chunks, address):
                yield chunk

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        return await tokenize(self._engine, request, limits=self._limits, executor=self._decoders)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._engine.detokenize(token_ids)

    async def describe(self) -> dict[str, str]:
        return self._engine.describe()

    async def get_context_length(self) -> int:
        return self._engine.context_length

    async def _send(
        self, answer: AsyncGenerator[Chunk], request: Request | CompletionRequest
    ) -> AsyncGenerator[Chunk]:
        """Yield the coalesced chunks of an answer, with the fingerprint; record metrics."""
        fingerprint = self._fingerprints.get(request.adapter, "")
        deadline = Deadline()
        self._deadlines.add(deadline)
        try:
            with self._metrics.track(request) as tracker:
                async with aclosing(self._coalesce(answer, request.num_answers)) as joined:
                    async for chunk in deadline.watch(joined):
                        tracker.note_chunk(chunk)
                        yield chunk._replace(fingerprint=fingerprint)
        finally:
            self._deadlines.discard(deadline)

    async def _coalesce(
        self, answer: AsyncGenerator[Chunk], num_answers: int
    ) -> AsyncGenerator[Chunk]:
        """Yield the chunks of an answer, joined so that the rate of messages stays bounded.

        The first chunk is yielded at once. Later ones are held back and joined while the replica
        would send more than `messages_per_s`, or this answer more than its share of that.
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
                    pause_s = max(_MIN_SHARES, self._num_streams) / self._messages_per_s
                    is_due = now - sent_at.get(chunk.answer, float("-inf")) >= pause_s
                    if chunk.finish_reason or (is_due and (chunk.text or chunk.logprobs)):
                        yield chunk
                        sent_at[chunk.answer] = now
                    else:
                        held[chunk.answer] = chunk
        finally:
            self._num_streams -= num_answers

    async def check_health(self) -> None:
        """Called by Serve; raises if the engine does not work, and Serve replaces the replica.

        Serve lets a replica finish its requests first. The requests of a broken engine are ended
        with an error, because the new replica waits for this one's CPUs and GPUs.
        """
        self._metrics.note_stats(self._engine.stats())
        try:
            await self._engine.check()
        except Exception:
            self._num_failed_checks += 1
            if self._num_failed_checks >= FAILED_CHECKS:
                for deadline in self._deadlines:
                    deadline.expire_now(
                        EngineError("the engine stopped working and is being replaced: try again")
                    )
            raise
        self._num_failed_checks = 0

    async def stats(self) -> dict[str, float]:
        return self._engine.stats()
