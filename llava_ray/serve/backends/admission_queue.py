"""Where requests wait for a busy model: so many at most, so long at most, and fair between keys."""

import asyncio
from collections import deque
from collections.abc import Callable

from llava_ray.errors import OverloadedError


class WaitingRoom:
    """Seats at one model, and a queue for each API key in front of them.

    A free seat goes to the keys in turn, however many requests each has there. In a full room a
    newcomer takes the place of the last request of the key that has the most, if that is another.

    Args:
        model: its name, for messages.
        num_seats: requests that the model may have at once.
        max_waiting: requests that may wait; None: any number.
        max_wait_s: seconds that one waits.
        note_waiting: told how many wait, when one begins or ends to.
    """

    def __init__(
        self,
        model: str,
        *,
        num_seats: int,
        max_waiting: int | None,
        max_wait_s: float,
        note_waiting: Callable[[int], None] = lambda num_waiting: None,
    ) -> None:
        self._model, self._max_wait_s = model, max_wait_s
        self._num_free, self._max_waiting = num_seats, max_waiting
        self._note_waiting = note_waiting
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # the key in front is next

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    async def enter(self, key: str) -> None:
        """Return once there is a seat; whoever got one calls `leave`.

        Raises:
            OverloadedError: the room is full, or none became free in time.
        """
        if self._num_free:
            self._num_free -= 1
            return
        if self._max_waiting is not None and self.num_waiting >= self._max_waiting:
            self._make_room(key)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(place)
        self._note_waiting(self.num_waiting)
        try:
            async with asyncio.timeout(self._max_wait_s):
                await place
        except TimeoutError:
            self._give_up(key, place)
            raise OverloadedError(
                f"{self._model!r} had no room for {self._max_wait_s:g} s: try again later"
            ) from None
        except asyncio.CancelledError:
            self._give_up(key, place)
            raise
        finally:
            self._note_waiting(self.num_waiting)

    def leave(self) -> None:
        """Give the seat to the next key's first request, if any waits."""
        for key in list(self._queues):
            queue = self._queues.pop(key)
            place = queue.popleft()
            if queue:
                self._queues[key] = queue  # behind the others
            if not place.done():
                place.set_result(None)
                return
        self._num_free += 1

    def _make_room(self, key: str) -> None:
        error = OverloadedError(
            f"{self._model!r} is busy and {self._max_waiting:,} requests wait already: "
            "try again in a moment"
        )
        longest = max(self._queues, key=lambda other: len(self._queues[other]), default=key)
        if len(self._queues.get(longest, ())) <= len(self._queues.get(key, ())) + 1:
            raise error
        self._queues[longest].pop().set_exception(error)

    def _give_up(self, key: str, place: asyncio.Future[None]) -> None:
        if place.done() and not place.cancelled() and place.exception() is None:
            self.leave()  # the seat came in the same moment
        elif place in self._queues.get(key, ()):
            self._queues[key].remove(place)
            if not self._queues[key]:
                del self._queues[key]
