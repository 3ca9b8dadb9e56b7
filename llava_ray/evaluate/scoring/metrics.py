"""Computes a task's metrics from its scored rows; the first metric is the headline.

The metric of a group is named "GROUP/METRIC" ("adversarial/f1"). Shares are in percent, as in the
papers. Summaries are pure functions; `statistics` calls them repeatedly to estimate standard
errors.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llava_ray.types import Question, Score

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip


class Scored(NamedTuple):
    """A question with its response and a score whose `value` is a number."""

    question: Question
    text: str
    score: Score


Summary = Callable[[Sequence[Scored]], dict[str, float]]


def summarize_accuracy(rows: Sequence[Scored]) -> dict[str, float]:
    """The mean score, over all rows and over each group."""
    total, sums, counts = 0.0, defaultdict[str, float](float), Counter[str]()
    for question, _, score in rows:
        value = score.value or 0.0
        total += value
        for group in question.groups:
            sums[group] += value
            counts[group] += 1
    numbers = {"accuracy": 100 * (total / len(rows)) if rows else 0.0}
    for group in sorted(sums):
        numbers[f"{group}/accuracy"] = 100 * (sums[group] / counts[group])
    return numbers


def summarize_circular(rows: Sequence[Scored]) -> dict[str, float]:
    """MMBench's accuracy: a question is right if it was right in every order of its options."""
    whole = [_join_cluster(members) for members in split_by_cluster(rows).values()]
    return summarize_accuracy(whole) | {"one_pass/accuracy": _mean([_value(row) for row in rows])}


def summarize_pope(rows: Sequence[Scored]) -> dict[str, float]:
    """F1, accuracy, precision, recall and ratio of yes: the mean over the splits, and of each."""
    splits = {name: _measure_yes(members) for name, members in split_by_group(rows).items()}
    measures = next(iter(splits.values()), {})
    numbers = {name: _share([split[name] for split in splits.values()]) for name in measures}
    for group, split in splits.items():
        numbers |= {f"{group}/{name}": value for name, value in split.items()}
    return numbers


def summarize_mme(rows: Sequence[Scored]) -> dict[str, float]:
    """Sums of 100 (acc + acc+) over the subtasks of perception (of 2,000) and cognition (of 800).

    acc+ is the share of images with both questions right, of those with two answers; a subtask
    without any has no score. A sum is there if all its subtasks are.
    """
    subtasks: dict[str, float] = {}
    details: dict[str, float] = {}
    for group, members in split_by_group(rows).items():
        right = [_value(row) for row in members]
        clusters = split_by_cluster(members).values()
        pairs = [_join_cluster(pair) for pair in clusters if len(pair) == 2]
        acc, acc_plus = _mean(right), _mean([_value(pair) for pair in pairs])
        details[f"{group}/acc"] = acc
        if pairs:
            details[f"{group}/acc_plus"] = acc_plus
            subtasks[group] = acc + acc_plus
    wholes = {"perception": MME_PERCEPTION, "cognition": MME_COGNITION}
    numbers = {
        whole: sum(subtasks[name] for name in names)
        for whole, names in wholes.items()
        if subtasks.keys() >= set(names)
    }
    scores = {f"{group}/score": score for group, score in subtasks.items()}
    return numbers | scores | details


def summarize_reviews(rows: Sequence[Scored]) -> dict[str, float]:
    """LLaVA-Bench's: the model's points in percent of the reference answer's, over all and by kind.

    `figures` of a row are the points of the reference and of the model. Their means are rounded to
    three places before the division, as in the original.
    """
    numbers: dict[str, float] = {}
    for group, members in {"": rows, **split_by_group(rows)}.items():
        pairs = [row.score.figures for row in members]
        reference, model = (round(_share(list(points)), 3) for points in zip(*pairs, strict=True))
        prefix = f"{group}/" if group else ""
        numbers[f"{prefix}ratio"] = 100 * model / reference if reference else 0.0
        numbers[f"{prefix}reference"] = 10 * reference
        numbers[f"{prefix}model"] = 10 * model
    return numbers


def split_by_group(rows: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Return the rows of each group, sorted by the group's name."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for row in rows:
        for group in row.question.groups:
            groups[group].append(row)
    return dict(sorted(groups.items()))


def split_by_cluster(rows: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Return the rows of each cluster; a row without one is a cluster by itself."""
    clusters: dict[str, list[Scored]] = defaultdict(list)
    for row in rows:
        clusters[row.question.cluster or f"\0{row.question.question_id}"].append(row)
    return clusters


def _join_cluster(members: Sequence[Scored]) -> Scored:
    """Return one row with the lowest score of all."""
    worst = min(members, key=_value)
    return members[0]._replace(score=worst.score)


def _measure_yes(rows: Sequence[Scored]) -> dict[str, float]:
    counts = Counter((row.score.parsed, _value(row)) for row in rows)
    true_yes, false_yes = counts["yes", 1.0], counts["yes", 0.0]
    true_no, false_no = counts["no", 1.0], counts["no", 0.0]
    precision = true_yes / (true_yes + false_yes) if true_yes else 0.0
    recall = true_yes / (true_yes + false_no) if true_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if true_yes else 0.0
    return {
        "f1": 100 * f1,
        "accuracy": 100 * (true_yes + true_no) / len(rows),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "yes_ratio": 100 * (true_yes + false_yes) / len(rows),
    }


def _value(row: Scored) -> float:
    assert row.score.value is not None
    return row.score.value


def _mean(values: Sequence[float]) -> float:
    return 100 * _share(values)


def _share(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
