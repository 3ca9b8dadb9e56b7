"""The admission queue of one model: bounded in length and wait, and fair between API keys."""

import asyncio
from collections import deque
from collections.abc import Callable

from llava_ray.errors import OverloadedError


class AdmissionQueue:
    """Slots of one model, and a queue of waiting requests for each API key.

    A free slot goes to the keys in turn (round robin), however many requests each key has waiting.
    When the queue is full, a new request evicts the last request of the key that has the most
    waiting, unless that is its own key; then the new request is refused.

    Args:
        model: the model's name, for error messages.
        num_slots: requests that the model may process at once.
        max_waiting: requests that may wait; None: no limit.
        max_wait_s: seconds after which a waiting request is refused.
        note_waiting: called with the number of waiting requests whenever it changes.
    """

    def __init__(
        self,
        model: str,
        *,
        num_slots: int,
        max_waiting: int | None,
        max_wait_s: float,
        note_waiting: Callable[[int], None] = lambda num_waiting: None,
    ) -> None:
        self._model, self._max_wait_s = model, max_wait_s
        self._num_free, self._max_waiting = num_slots, max_waiting
        self._note_waiting = note_waiting
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # the first key is next in turn

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    async def acquire(self, key: str) -> None:
        """Wait for a slot; whoever gets one calls `release`.

        Raises:
            OverloadedError: the queue is full, or no slot became free in time.
        """
        if self._num_free:
            self._num_free -= 1
            return
        if self._max_waiting is not None and self.num_waiting >= self._max_waiting:
            self._evict_for(key)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(waiter)
        self._note_waiting(self.num_waiting)
        try:
            async with asyncio.timeout(self._max_wait_s):
                await waiter
        except TimeoutError:
            self._withdraw(key, waiter)
            raise OverloadedError(
                f"{self._model!r} had no free slot for {self._max_wait_s:g} s: try again later"
            ) from None
        except asyncio.CancelledError:
            self._withdraw(key, waiter)
            raise
        finally:
            self._note_waiting(self.num_waiting)

    def release(self) -> None:
        """Pass the slot to the first waiting request of the next key, if there is one."""
        for key in list(self._queues):
            queue = self._queues.pop(key)
            waiter = queue.popleft()
            if queue:
                self._queues[key] = queue  # now the last in turn
            if not waiter.done():
                waiter.set_result(None)
                return
        self._num_free += 1

    def _evict_for(self, key: str) -> None:
        error = OverloadedError(
            f"{self._model!r} is busy and {self._max_waiting:,} requests are waiting already: "
            "try again in a moment"
        )
        longest = max(self._queues, key=lambda other: len(self._queues[other]), default=key)
        if len(self._queues.get(longest, ())) <= len(self._queues.get(key, ())) + 1:
            raise error
        self._queues[longest].pop().set_exception(error)

    def _withdraw(self, key: str, waiter: asyncio.Future[None]) -> None:
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self.release()  # it got a slot at the same moment
        elif waiter in self._queues.get(key, ()):
            self._queues[key].remove(waiter)
            if not self._queues[key]:
                del self._queues[key]
