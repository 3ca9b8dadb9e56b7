"""Ends a request from outside: when its time is over, or when another one takes its place."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from llava_ray.errors import DeadlineError, LlavaRayError

Item = TypeVar("Item")


class Deadline:
    """When a request has to be over, and what its client is told if it is not.

    Args:
        timeout_s: from now on; None: it may go on for ever.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self._ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        self._error: LlavaRayError = DeadlineError(
            f"the request took longer than the {timeout_s or 0:g} s that it may, and was stopped: "
            "ask for fewer tokens, or try again when there is less to do"
        )
        self._timers: set[asyncio.Timeout] = set()

    def expire_now(self, error: LlavaRayError) -> None:
        """Stop the request at once, and tell its client this."""
        self._ends_at, self._error = time.monotonic(), error
        for timer in self._timers:
            timer.reschedule(0)

    def release(self, timer: asyncio.Timeout) -> None:
        """Let what one `enforce` yielded go on to its end."""
        self._timers.discard(timer)
        timer.reschedule(None)

    @asynccontextmanager
    async def enforce(self) -> AsyncIterator[asyncio.Timeout]:
        """Cancel what is done inside at the deadline.

        Raises:
            LlavaRayError: it was cancelled; the error says why.
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
        """Yield the items, each of which has to come before the deadline."""
        iterator = aiter(items)
        while True:
            async with self.enforce():
                try:
                    item = await anext(iterator)
                except StopAsyncIteration:
                    return
            yield item
