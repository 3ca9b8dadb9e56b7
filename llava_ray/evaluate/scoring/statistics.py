"""Estimates standard errors of any summary, by the jackknife.

Clusters of rows (questions about one image) are left out a group at a time, the summary is
computed without them, and the spread of the results gives the standard error (Tukey 1958). For a
mean of independent rows this is the usual formula; it also holds for F1, for sums over subtasks and
for differences between two models that answered the same rows.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

MAX_GROUPS = 100
NORMAL_95 = 1.96

Row = TypeVar("Row")


class Estimate(NamedTuple):
    """A number with its standard error.

    Attributes:
        value: computed from all rows.
        standard_error: None if there are too few clusters to estimate it.
        num_rows: number of rows from which it was computed.
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
    groups_of: Callable[[Row], Sequence[str]] = lambda _: (),
) -> dict[str, Estimate]:
    """Return the numbers of a summary with their standard errors.

    A number called "GROUP/..." is made of the rows of that group alone, and its standard error is
    that of these rows.

    Args:
        rows: at least one.
        summarize: names each number.
        cluster_of: what a row shares with those that are not independent of it.
        groups_of: the groups that a row belongs to.
    """
    values = summarize(rows)
    members: dict[str, list[Row]] = {}
    for row in rows:
        for group in groups_of(row):
            members.setdefault(group, []).append(row)
    names_by_group: dict[str, list[str]] = {}
    for name in values:
        matching = (group for group in members if name.startswith(f"{group}/"))
        names_by_group.setdefault(max(matching, key=len, default=""), []).append(name)
    estimates: dict[str, Estimate] = {}
    for group, names in names_by_group.items():
        some = members[group] if group else rows
        errors = _measure_errors(some, summarize, cluster_of, names)
        estimates |= {name: Estimate(values[name], errors[name], len(some)) for name in names}
    return {name: estimates[name] for name in values}


def _measure_errors(
    rows: Sequence[Row],
    summarize: Callable[[Sequence[Row]], Mapping[str, float]],
    cluster_of: Callable[[Row], str],
    names: Sequence[str],
) -> dict[str, float | None]:
    """Return standard errors; None where a part of the rows is too small to give the number."""
    groups = _group(rows, cluster_of)
    if len(groups) < 2:
        return dict.fromkeys(names)
    parts = [
        summarize([*chain.from_iterable(groups[:i]), *chain.from_iterable(groups[i + 1 :])])
        for i in range(len(groups))
    ]
    return {
        name: _spread([part[name] for part in parts]) if all(name in p for p in parts) else None
        for name in names
    }


def _spread(values: Sequence[float]) -> float:
    number = len(values)
    mean = sum(values) / number
    return math.sqrt((number - 1) / number * sum((value - mean) ** 2 for value in values))


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _group(rows: Sequence[Row], cluster_of: Callable[[Row], str]) -> list[list[Row]]:
    """Distribute clusters over at most `MAX_GROUPS` groups, in the same way in every run."""
    clusters: dict[str, list[Row]] = {}
    for row in rows:
        clusters.setdefault(cluster_of(row), []).append(row)
    names = sorted(
        clusters, key=lambda name: hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    )
    groups: list[list[Row]] = [[] for _ in range(min(MAX_GROUPS, len(names)))]
    for i, name in enumerate(names):
        groups[i % len(groups)].extend(clusters[name])
    return groups
