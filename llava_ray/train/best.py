"""Choose a run's best checkpoint by a loss or by the score of a benchmark task."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

LOSSES = ("loss", "eval_loss")
UNKNOWN = math.nan
"""The value of a metric that has not been measured yet."""

Checkpoint = TypeVar("Checkpoint")


def find_order(metric: str | None) -> Literal["min", "max"]:
    """Return whether the lowest or the highest value of a metric is the best."""
    return "min" if metric is None or metric in LOSSES else "max"


def choose_best(
    measured: Iterable[tuple[Checkpoint, Mapping[str, float]]], metric: str
) -> Checkpoint | None:
    """Return the checkpoint with the best value, the last of equals; None if none was measured."""
    best, best_figure = None, UNKNOWN
    is_better = float.__le__ if find_order(metric) == "min" else float.__ge__
    for checkpoint, figures in measured:
        figure = float(figures.get(metric, UNKNOWN))
        if not math.isnan(figure) and (best is None or is_better(figure, best_figure)):
            best, best_figure = checkpoint, figure
    return best
