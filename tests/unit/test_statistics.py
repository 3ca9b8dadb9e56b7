"""Standard errors, also of scores from few rows."""

import math
from collections.abc import Sequence

import pytest

from llava_ray.evaluate.scoring.metrics import (
    Scored,
    summarize_accuracy,
    summarize_circular,
    summarize_mme,
    summarize_pope,
    summarize_reviews,
)
from llava_ray.evaluate.scoring.statistics import Estimate, estimate
from llava_ray.types import Question, Score


def make_rows(values: Sequence[float], group: str = "", cluster: str = "") -> list[Scored]:
    groups = (group,) if group else ()
    return [
        Scored(Question(f"{group}{i}", "?", groups=groups, cluster=cluster), "", Score(value))
        for i, value in enumerate(values)
    ]


def measure(rows: list[Scored], summarize=summarize_accuracy) -> dict[str, Estimate]:
    return estimate(
        rows,
        summarize,
        cluster_of=lambda row: row.question.cluster or row.question.question_id,
        groups_of=lambda row: row.question.groups,
    )


def test_the_error_of_a_mean_is_the_usual_one() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    mean = sum(values) / 7
    expected = math.sqrt(sum((value - mean) ** 2 for value in values) / 6 / 7)
    found = measure(make_rows(values))["accuracy"]
    assert found.standard_error == pytest.approx(100 * expected)


def test_a_group_of_one_has_no_error_and_one_of_two_its_own() -> None:
    rows = make_rows([1] * 30 + [0] * 20, "many") + make_rows([1], "one") + make_rows([1, 0], "two")
    numbers = measure(rows)
    assert numbers["one/accuracy"] == Estimate(100, None, 1)
    assert numbers["two/accuracy"].standard_error == pytest.approx(50)
    assert numbers["two/accuracy"].num_rows == 2
    assert numbers["many/accuracy"].num_rows == 50
    assert numbers["accuracy"].num_rows == 53
    assert measure(rows[-2:])["accuracy"].standard_error == pytest.approx(50)
    assert measure(rows[:1])["accuracy"].standard_error is None


def test_rows_of_one_cluster_count_as_one() -> None:
    found = measure(make_rows([1, 1, 0], "group", cluster="image") + make_rows([1, 0], "other"))
    assert found["group/accuracy"].standard_error is None
    assert found["accuracy"].standard_error is not None


def test_a_sum_that_a_part_of_the_rows_cannot_give_has_no_error() -> None:
    names = "existence count position color posters celebrity scene landmark artwork OCR".split()
    rows = [row for name in names for i in "ab" for row in make_rows([1, 0], name, f"{name}/{i}")]
    assert measure(rows, summarize_mme)["perception"].standard_error is not None
    assert measure(rows[2:], summarize_mme)["perception"].standard_error is None


@pytest.mark.parametrize(
    "summarize", [summarize_accuracy, summarize_circular, summarize_mme, summarize_pope,
                  summarize_reviews]
)  # fmt: skip
def test_every_summary_bears_groups_of_any_size(summarize) -> None:
    rows = [
        row._replace(score=Score(row.score.value, "yes", figures=(8, 6)))
        for row in make_rows([1, 0, 1], "a/b") + make_rows([0], "a") + make_rows([1, 1], "c")
    ]
    for number in range(1, len(rows) + 1):
        found = measure(rows[:number], summarize)
        assert list(found) == list(summarize(rows[:number]))
        for name, value in found.items():
            assert math.isfinite(value.value)
            if name.startswith("a/") and not name.startswith("a/b/"):
                assert (value.num_rows, value.standard_error) == (1, None)
