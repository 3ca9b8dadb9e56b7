"""Sends one request to an engine, a server or a live application, and collects the answer."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from llava_ray.errors import LlavaRayError, RequestError, SampleError
from llava_ray.types import ChatRequest, Chunk

Answerer = Callable[[ChatRequest], AsyncGenerator[Chunk]]
NUM_ATTEMPTS = 6
FIRST_PAUSE_S = 0.5

T = TypeVar("T")


class Completion(NamedTuple):
    """The complete answer to one request.

    Attributes:
        text: the whole text.
        last: the last chunk, with the finish reason, token counts and fingerprint.
        latency_s: seconds from sending the request to the end of the answer.
        confidence: geometric mean of the tokens' probabilities; None without logprobs.
    """

    text: str
    last: Chunk
    latency_s: float
    confidence: float | None


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also in a notebook, whose own event loop runs already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="evaluate") as pool:
        return pool.submit(asyncio.run, work).result()


async def ask(answer: Answerer, request: ChatRequest) -> Completion:
    """Send a request once.

    Raises:
        LlavaRayError: the engine or server failed.
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
        LlavaRayError: the last attempt failed.
    """
    for attempt in range(NUM_ATTEMPTS - 1):
        try:
            return await once()
        except (RequestError, SampleError):
            raise
        except LlavaRayError:
            await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
    return await once()
