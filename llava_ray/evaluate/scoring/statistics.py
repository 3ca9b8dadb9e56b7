"""How sure a number is: standard errors by the jackknife, for any summary.

Clusters of rows (questions about one image) are left out a group at a time, the summary is made
anew, and the spread of what comes out gives the standard error (Tukey 1958). For a mean of
independent rows this is the usual formula; it holds as well for F1, for sums over subtasks and for
differences between two models that answered the same rows.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

MAX_GROUPS = 100
NORMAL_95 = 1.96

Row = TypeVar("Row")


class Estimate(NamedTuple):
    """A number and how sure it is.

    Attributes:
        value: of all rows.
        standard_error: None where there is a single cluster.
        num_rows: how many rows it is made of.
    """

    value: float
    standard_error: float | None
    num_rows: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval, by the normal approximation."""
        if self.standard_error is None:
            return None
        reach = NORMAL_95 * self.standard_error
        return self.value - reach, self.value + reach


def estimate(
    rows: Sequence[Row],
    summarize: Callable[[Sequence[Row]], Mapping[str, float]],
    *,
    cluster_of: Callable[[Row], str],
) -> dict[str, Estimate]:
    """Return the numbers of a summary with their standard errors.

    Args:
        rows: at least one.
        summarize: names each number; a number that a part of the rows does not give is left out of
            that part's spread.
        cluster_of: what a row shares with those that are not independent of it.
    """
    values = summarize(rows)
    groups = _group(rows, cluster_of)
    if len(groups) < 2:
        return {name: Estimate(value, None, len(rows)) for name, value in values.items()}
    parts = [
        summarize([row for j, group in enumerate(groups) if j != i for row in group])
        for i in range(len(groups))
    ]
    return {
        name: Estimate(value, _spread([p[name] for p in parts if name in p]), len(rows))
        for name, value in values.items()
    }


def _spread(values: Sequence[float]) -> float | None:
    number = len(values)
    if number < 2:
        return None
    mean = sum(values) / number
    return math.sqrt((number - 1) / number * sum((value - mean) ** 2 for value in values))


def _group(rows: Sequence[Row], cluster_of: Callable[[Row], str]) -> list[list[Row]]:
    """Put clusters into at most `MAX_GROUPS` groups of like size, the same in every run."""
    clusters: dict[str, list[Row]] = {}
    for row in rows:
        clusters.setdefault(cluster_of(row), []).append(row)
    names = sorted(clusters, key=lambda name: hashlib.sha256(name.encode()).digest())
    groups: list[list[Row]] = [[] for _ in range(min(MAX_GROUPS, len(names)))]
    for i, name in enumerate(names):
        groups[i % len(groups)].extend(clusters[name])
    return groups
