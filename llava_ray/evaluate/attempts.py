"""Questions that actors died with. A question may be why: nothing else would end its being retried.

All actors of a run count in one place, which outlives them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

MAX_DEATHS = 2
"""Actors that may die with a question before it counts as failed."""


class Attempts:
    """How often each question was begun and not ended."""

    def __init__(self) -> None:
        self._num_open: Counter[str] = Counter()

    def begin(self, ids: Sequence[str]) -> None:
        self._num_open.update(ids)

    def end(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            del self._num_open[id_]

    def count_deaths(self, ids: Sequence[str]) -> list[int]:
        """Return how often each of these was begun and not ended; none of them is being asked."""
        return [self._num_open[id_] for id_ in ids]


class SharedAttempts(Attempts):
    """The same, counted by an actor of Ray's for whoever has this object."""

    def __init__(self) -> None:
        import ray

        actor = ray.remote(Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self._counter: Any = actor.remote()

    def begin(self, ids: Sequence[str]) -> None:
        self._call("begin", ids)

    def end(self, ids: Sequence[str]) -> None:
        self._call("end", ids)

    def count_deaths(self, ids: Sequence[str]) -> list[int]:
        return self._call("count_deaths", ids)

    def _call(self, name: str, ids: Sequence[str]) -> Any:
        import ray

        return ray.get(getattr(self._counter, name).remote(ids))
