"""Which of a run's checkpoints is the best, by a loss or by a task of its benchmarks."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

LOSSES = ("loss", "eval_loss")
UNKNOWN = math.nan
"""A checkpoint's figure as long as it was not measured."""

Checkpoint = TypeVar("Checkpoint")


def find_order(metric: str | None) -> Literal["min", "max"]:
    """Return whether the lowest or the highest figure is the best."""
    return "min" if metric is None or metric in LOSSES else "max"


def choose_best(
    measured: Iterable[tuple[Checkpoint, Mapping[str, float]]], metric: str
) -> Checkpoint | None:
    """Return the checkpoint with the best figure, the later one of equals; None if none has any."""
    best, best_figure = None, UNKNOWN
    is_better = float.__le__ if find_order(metric) == "min" else float.__ge__
    for checkpoint, figures in measured:
        figure = float(figures.get(metric, UNKNOWN))
        if not math.isnan(figure) and (best is None or is_better(figure, best_figure)):
            best, best_figure = checkpoint, figure
    return best
