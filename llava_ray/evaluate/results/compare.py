"""Compares two runs of the same tasks, sample by sample.

Both models answered the same questions, so their scores are correlated. The standard error of the
difference is therefore computed over pairs, and is smaller than the two separate ones suggest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llava_ray.errors import ConfigError
from llava_ray.evaluate.results.results import list_groups, name_cluster
from llava_ray.evaluate.results.samples import SampleRecord, find_samples, read_samples, to_scored
from llava_ray.evaluate.scoring.metrics import Scored
from llava_ray.evaluate.scoring.statistics import Estimate, estimate
from llava_ray.evaluate.tasks import find_tasks


class Pair(NamedTuple):
    """A question that both runs answered."""

    before: Scored
    after: Scored


@dataclass(frozen=True)
class Difference:
    """One metric of two runs, over the questions that both answered.

    Attributes:
        before: its value in the first run.
        after: its value in the second run.
        change: after minus before, with its standard error.
    """

    before: float
    after: float
    change: Estimate


@dataclass(frozen=True)
class Comparison:
    """A task in two runs.

    Attributes:
        task: its name.
        numbers: the task's metrics by name, the headline first.
        num_both: number of questions that both runs have a score for; only these are compared.
        num_one: number of the other questions.
        flipped: pairs whose scores differ, the largest change first.
    """

    task: str
    numbers: dict[str, Difference]
    num_both: int
    num_one: int
    flipped: list[Pair]


def compare_runs(before: Path, after: Path) -> list[Comparison]:
    """Compare the tasks that two folders of results have in common.

    Raises:
        ConfigError: they have none, or the questions are not the same.
    """
    first, second = find_samples(before), find_samples(after)
    names = [name for name in first if name in second]
    if not names:
        raise ConfigError(
            f"{before} has {', '.join(first)} and {after} has {', '.join(second)}: there is no "
            "task in common"
        )
    return [_compare(name, read_samples(first[name]), read_samples(second[name])) for name in names]


def _compare(
    name: str, before: Sequence[SampleRecord], after: Sequence[SampleRecord]
) -> Comparison:
    (task,) = find_tasks([name])
    by_id = {sample["id"]: sample for sample in after}
    pairs: list[Pair] = []
    for sample in before:
        other = by_id.get(sample["id"])
        if other is None:
            continue
        if (sample["prompt"], sample["answers"]) != (other["prompt"], other["answers"]):
            raise ConfigError(
                f"{name}: question {sample['id']} is not the same in both runs: evaluate both on "
                "the same files to compare them"
            )
        one, two = to_scored(sample), to_scored(other)
        if one and two:
            pairs.append(Pair(one, two))
    ids = {sample["id"] for sample in before} | by_id.keys()
    numbers: dict[str, Difference] = {}
    if pairs:

        def subtract(some: Sequence[Pair]) -> Mapping[str, float]:
            first = task.summarize([pair.before for pair in some])
            second = task.summarize([pair.after for pair in some])
            return {name: second[name] - first[name] for name in first if name in second}

        first = task.summarize([pair.before for pair in pairs])
        second = task.summarize([pair.after for pair in pairs])
        changes = estimate(
            pairs,
            subtract,
            cluster_of=lambda pair: name_cluster(pair.before),
            groups_of=lambda pair: list_groups(pair.before),
        )
        numbers = {n: Difference(first[n], second[n], change) for n, change in changes.items()}
    flipped = sorted((p for p in pairs if _change(p)), key=lambda p: -abs(_change(p)))
    return Comparison(name, numbers, len(pairs), len(ids) - len(pairs), flipped)


def _change(pair: Pair) -> float:
    return (pair.after.score.value or 0.0) - (pair.before.score.value or 0.0)
