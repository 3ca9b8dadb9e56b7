"""Cancels a request from outside: at its deadline, or when a retry supersedes it."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from llava_ray.errors import DeadlineError, LlavaRayError

Item = TypeVar("Item")


class Deadline:
    """When a request must have ended, and the error that its client gets otherwise.

    Args:
        timeout_s: seconds from now; None: no limit.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self._ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        self._error: LlavaRayError = DeadlineError(
            f"the request took longer than the {timeout_s or 0:g} s allowed and was stopped: "
            "ask for fewer tokens, or try again when the server is less busy"
        )
        self._timers: set[asyncio.Timeout] = set()

    def expire_now(self, error: LlavaRayError) -> None:
        """Cancel the request at once; its client gets this error."""
        self._ends_at, self._error = time.monotonic(), error
        for timer in self._timers:
            timer.reschedule(0)

    def release(self, timer: asyncio.Timeout) -> None:
        """Exempt one `enforce` block from the deadline; `timer` is what it yielded."""
        self._timers.discard(timer)
        timer.reschedule(None)

    @asynccontextmanager
    async def enforce(self) -> AsyncIterator[asyncio.Timeout]:
        """Cancel the block at the deadline.

        Raises:
            LlavaRayError: the block was cancelled; the error says why.
        """
        left_s = None if self._ends_at is None else max(self._ends_at - time.monotonic(), 0)
        timer = asyncio.timeout(left_s)
        try:
            async with timer:
                self._timers.add(timer)
                yield timer
        except TimeoutError:
            if timer.expired():
                raise self._error from None
            raise
        finally:
            self._timers.discard(timer)

    async def watch(self, items: AsyncIterable[Item]) -> AsyncIterator[Item]:
        """Yield the items; the deadline holds while waiting for each of them."""
        iterator = aiter(items)
        while True:
            async with self.enforce():
                try:
                    item = await anext(iterator)
                except StopAsyncIteration:
                    return
            yield item
