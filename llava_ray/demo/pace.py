"""The pace of training: a stage's clock, learning rate, steps, log and checkpoints."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from llava_ray.demo import partners

SAVE_EVERY_MINUTES = 2.0
WARM_UP = 0.02  # of a stage
LAST_RATE = 0.02  # of the highest


class Stage:
    """One stage of training: so many minutes of steps on one model, saved now and then.

    Minutes are CPU time per thread, so a process that is stopped for a while, or shares its core,
    does no fewer steps for it.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        checkpoint: Path,
        *,
        minutes: float,
        rate: float,
        threads: int = 1,
        weight_decay: float = 0.02,
        shares: Mapping[nn.Module, float] | None = None,
        log_every_s: float = 30,
    ) -> None:
        """`shares` names the parts that learn and their share of `rate`; without it, all do."""
        groups = [
            {"params": list(part.parameters()), "share": share}
            for part, share in (shares or {model: 1.0}).items()
        ]
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
        )
        self._name, self._model, self._checkpoint = name, model, checkpoint
        self._minutes, self._threads, self._rate = minutes, threads, rate
        self._log = _Log(log_every_s)
        self._start, self._saved = time.process_time(), 0.0
        self.progress = 0.0  # from 0 to 1

    @property
    def is_over(self) -> bool:
        return self.progress >= 1

    @property
    def _minutes_spent(self) -> float:
        return (time.process_time() - self._start) / 60 / self._threads

    def step(self, loss: torch.Tensor, **report: float) -> None:
        """One step against the gradient of `loss`; `report` goes to the log."""
        loss.backward()
        spent = self._minutes_spent
        self.progress = partners.average_gradients(self._parameters, spent / self._minutes)
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(self.progress, self._rate) * group["share"]
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if partners.rank() > 0:
            return
        self._log.add(f"{self._name} {spent:5.1f} min", loss=loss.item(), **report)
        if self.is_over or spent > self._saved + SAVE_EVERY_MINUTES:
            self._saved = spent
            save(self._model, self._checkpoint)


def rate_at(progress: float, peak: float) -> float:
    """A learning rate that climbs to `peak` and sinks along half a cosine, nearly to nothing."""
    falling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * min(progress / WARM_UP + 0.01, falling)


def save(model: nn.Module, checkpoint: Path) -> None:
    """Save weights such that a reader never sees half a file."""
    half = checkpoint.with_suffix(".half")
    torch.save(model.state_dict(), half)
    os.replace(half, checkpoint)


def resume(model: nn.Module, checkpoint: Path) -> None:
    """Load weights where there are some."""
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint))


class _Log:
    """Prints running means of what is reported, every `every_s` seconds."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._printed = every_s, time.monotonic()
        self._values: dict[str, list[float]] = {}
        self._steps = 0

    def add(self, heading: str, **values: float) -> None:
        self._steps += 1
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
        if time.monotonic() - self._printed < self._every_s:
            return
        means = "  ".join(f"{name} {sum(x) / len(x):.3f}" for name, x in self._values.items())
        print(f"{heading}  step {self._steps}  {means}", flush=True)
        self._values, self._printed = {}, time.monotonic()
