"""The pace of training: a stage's clock and learning rate, its log, its checkpoints."""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from llava_ray.demo import partners


class Clock:
    """How far a stage of so many minutes has come.

    It counts CPU time, so a process that is stopped for a while, or shares its core, does no fewer
    steps for it.
    """

    def __init__(self, minutes: float, threads: int) -> None:
        self._minutes, self._threads, self._start = minutes, threads, time.process_time()

    @property
    def minutes_spent(self) -> float:
        return (time.process_time() - self._start) / 60 / self._threads

    @property
    def progress(self) -> float:
        return min(1.0, self.minutes_spent / self._minutes)


def rate_at(progress: float, peak: float) -> float:
    """A learning rate that climbs to `peak` and sinks along half a cosine, nearly to nothing."""
    return peak * min(progress / 0.02 + 0.01, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


class Log:
    """Prints running means of what a stage reports, every `every_s` seconds."""

    def __init__(self, stage: str, *, every_s: float = 30) -> None:
        self._stage, self._every_s, self._printed = stage, every_s, time.monotonic()
        self._sums: dict[str, list[float]] = {}
        self.steps = 0

    def __call__(self, clock: Clock, **values: float) -> None:
        if partners.rank() > 0:
            return
        self.steps += 1
        for name, value in values.items():
            self._sums.setdefault(name, []).append(value)
        if time.monotonic() - self._printed < self._every_s:
            return
        means = "  ".join(f"{name} {sum(x) / len(x):.3f}" for name, x in self._sums.items())
        print(
            f"{self._stage} {clock.minutes_spent:5.1f} min  step {self.steps}  {means}", flush=True
        )
        self._sums, self._printed = {}, time.monotonic()


def save_atomically(path: Path, **content: Any) -> None:
    """`torch.save`, such that a reader never sees half a file."""
    half = path.with_suffix(".half")
    torch.save(content, half)
    os.replace(half, path)
