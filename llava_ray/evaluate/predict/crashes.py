"""Counts, by question, the actors that crashed while they answered it.

An actor that starts again after a crash asks here which of its questions may have caused it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

MAX_CRASHES = 2
"""A question counts as failed once this many actors have crashed while answering it."""


class CrashCounter:
    """Counts, for each question, the actors that began to answer it and crashed."""

    def __init__(self) -> None:
        self._num_open: Counter[str] = Counter()

    def begin(self, ids: Sequence[str]) -> None:
        self._num_open.update(ids)

    def end(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            del self._num_open[id_]

    def count_crashes(self, ids: Sequence[str]) -> list[int]:
        """Return the number of crashes for each question; none of them may be in flight."""
        return [self._num_open[id_] for id_ in ids]


class SharedCrashCounter(CrashCounter):
    """A `CrashCounter` that lives in a Ray actor, so that all predictors share it."""

    def __init__(self) -> None:
        import ray

        actor = ray.remote(CrashCounter).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self._counter: Any = actor.remote()

    def begin(self, ids: Sequence[str]) -> None:
        self._call("begin", ids)

    def end(self, ids: Sequence[str]) -> None:
        self._call("end", ids)

    def count_crashes(self, ids: Sequence[str]) -> list[int]:
        return self._call("count_crashes", ids)

    def _call(self, name: str, ids: Sequence[str]) -> Any:
        import ray

        return ray.get(getattr(self._counter, name).remote(ids))
