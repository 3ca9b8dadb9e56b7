"""The admission queue of one model: bounded in length and wait, and fair between API keys."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from llava_ray.errors import OverloadedError


@dataclass(eq=False)
class _Waiter:
    """A request that waits, and the slots that it still lacks."""

    num_slots: int
    num_missing: int
    admitted: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class AdmissionQueue:
    """Slots of one model, and a queue of waiting requests for each API key.

    A request takes a slot for each of its answers. Free slots go to the keys in turn (round robin),
    however many requests each key has waiting; the request whose turn it is collects them until it
    has enough, so that requests of many answers are not overtaken for ever.
    When the queue is full, a new request evicts the last request of the key that has the most
    waiting, unless that is its own key; then the new request is refused.

    Args:
        model: the model's name, for error messages.
        num_slots: answers that the model may compute at once.
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
        self._num_slots = self._num_free = num_slots
        self._max_waiting = max_waiting
        self._note_waiting = note_waiting
        self._queues: dict[str, deque[_Waiter]] = {}  # the first key is next in turn

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    async def acquire(self, key: str, num_answers: int = 1) -> int:
        """Wait for the slots of a request and return their number, which goes to `release`.

        A request of more answers than the model has slots gets all of them.

        Raises:
            OverloadedError: the queue is full, or not enough slots became free in time.
        """
        num_slots = min(num_answers, self._num_slots)
        if self._num_free >= num_slots:
            self._num_free -= num_slots
            return num_slots
        if self._max_waiting is not None and self.num_waiting >= self._max_waiting:
            self._evict_for(key)
        # Slots are only free while nobody waits: this request is the first to collect.
        waiter = _Waiter(num_slots, num_slots - self._num_free)
        self._num_free = 0
        self._queues.setdefault(key, deque()).append(waiter)
        self._note_waiting(self.num_waiting)
        try:
            async with asyncio.timeout(self._max_wait_s):
                await waiter.admitted
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
        return num_slots

    def release(self, num_slots: int) -> None:
        """Pass slots on to the requests whose turn it is; without any they are free."""
        while num_slots and self._queues:
            key = next(iter(self._queues))
            waiter = self._queues[key][0]
            num_passed = min(num_slots, waiter.num_missing)
            num_slots -= num_passed
            waiter.num_missing -= num_passed
            if not waiter.num_missing:
                queue = self._queues.pop(key)
                queue.popleft()
                if queue:
                    self._queues[key] = queue  # now the last in turn
                if not waiter.admitted.done():  # else it is about to withdraw
                    waiter.admitted.set_result(None)
        self._num_free += num_slots

    def _evict_for(self, key: str) -> None:
        error = OverloadedError(
            f"{self._model!r} is busy and {self._max_waiting:,} requests are waiting already: "
            "try again in a moment"
        )
        longest = max(self._queues, key=lambda other: len(self._queues[other]), default=key)
        if len(self._queues.get(longest, ())) <= len(self._queues.get(key, ())) + 1:
            raise error
        self._queues[longest].pop().admitted.set_exception(error)

    def _withdraw(self, key: str, waiter: _Waiter) -> None:
        if waiter in self._queues.get(key, ()):
            self._queues[key].remove(waiter)
            if not self._queues[key]:
                del self._queues[key]
            self.release(waiter.num_slots - waiter.num_missing)
        elif waiter.num_missing == 0:
            self.release(waiter.num_slots)  # it was admitted at the same moment
