"""Sends one request to an engine, a server or the live application; collects the whole answer."""

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
    """The whole answer to one request.

    Attributes:
        text: all of it.
        last: its last chunk, which holds the finish reason and the token counts.
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
        LlavaRayError: the error of the engine or server.
    """
    started, last, pieces, logprobs = time.perf_counter(), None, [], []
    async for last in answer(request):
        pieces.append(last.text)
        logprobs += [token.logprob for token in last.logprobs]
    assert last is not None, "an answer has at least one chunk"
    confidence = math.exp(sum(logprobs) / len(logprobs)) if logprobs else None
    return Completion("".join(pieces), last, time.perf_counter() - started, confidence)


async def ask_with_retries(once: Callable[[], Awaitable[T]]) -> T:
    """Call `once` until it succeeds, with a pause that doubles after each temporary failure.

    Raises:
        RequestError, SampleError: raised at once, because a retry would not help.
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
