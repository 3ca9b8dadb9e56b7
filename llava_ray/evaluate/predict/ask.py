"""A question to whoever answers (an engine, a server, the live application) -> one whole reply."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NamedTuple, TypeVar

from llava_ray.errors import LlavaRayError, RequestError, SampleError
from llava_ray.types import ChatRequest, Chunk

Answerer = Callable[[ChatRequest], AsyncGenerator[Chunk]]
NUM_ATTEMPTS = 6
FIRST_PAUSE_S = 0.5

T = TypeVar("T")


class Completion(NamedTuple):
    """A whole reply.

    Attributes:
        text: all of it.
        last: its last piece, with the reason of its end and the numbers of tokens.
        latency_s: from the question to its end.
        confidence: geometric mean of its tokens' probabilities; None without logprobs.
    """

    text: str
    last: Chunk
    latency_s: float
    confidence: float | None


async def ask(answer: Answerer, request: ChatRequest) -> Completion:
    """Ask once.

    Raises:
        LlavaRayError: whatever the one who was asked raises.
    """
    started, last, pieces, logprobs = time.perf_counter(), None, [], []
    async for last in answer(request):
        pieces.append(last.text)
        logprobs += [token.logprob for token in last.logprobs]
    assert last is not None, "an answer has at least one piece"
    confidence = math.exp(sum(logprobs) / len(logprobs)) if logprobs else None
    return Completion("".join(pieces), last, time.perf_counter() - started, confidence)


async def ask_with_retries(once: Callable[[], Awaitable[T]]) -> T:
    """Try until it works; after each failure that may pass, twice as long a pause.

    Raises:
        RequestError, SampleError: at once, another try would not help.
        LlavaRayError: that of the last attempt.
    """
    for attempt in range(NUM_ATTEMPTS - 1):
        try:
            return await once()
        except (RequestError, SampleError):
            raise
        except LlavaRayError:
            await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
    return await once()
