"""A training stage: its time, learning rate, steps, log and checkpoints."""

import math
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.embedded_model import partners
from jobs.embedded_model.muon import Muon
from llava_ray.model.precision import has_fast_bfloat16

SAVE_EVERY_MINUTES = 2.0
WARM_UP = 0.02  # fraction of a stage
LAST_RATE = 0.02  # fraction of the peak learning rate
MATRIX_RATE = 2.0  # Muon's learning rate, relative to AdamW's


@dataclass(frozen=True)
class Pace:
    """How long a stage trains, and its seed.

    Attributes:
        minutes: CPU time per thread.
        seed: seed of the initial weights, which partners share, and of the samples, which differ.
        threads: number of threads of this process.
    """

    minutes: float
    seed: int = 0
    threads: int = 1
    log_every_s: float = 30

    def begin(self, name: str) -> random.Random:
        """Seed torch for building a stage's model; return the generator of its samples."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        return random.Random(f"{name} {self.seed} {partners.rank()}")


def autocast() -> torch.autocast:
    """Return a context with matmuls in bfloat16 if the CPU has instructions for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16())


class Stage:
    """One stage of training: a number of minutes on one model, with regular checkpoints.

    Muon updates the matrices inside transformer blocks, AdamW everything else. Minutes are CPU time
    per thread, so a process that is stopped for a while, or shares its core, makes as many steps.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        checkpoint: Path,
        pace: Pace,
        *,
        rate: float,
        weight_decay: float = 0.02,
        shares: Mapping[Any, float] | None = None,
    ) -> None:
        """`shares`: the trained parts and their fraction of `rate`; by default all parts."""
        parts = (shares or {model: 1.0}).items()
        self._parameters = [parameter for part, _ in parts for parameter in part.parameters()]
        self._optimizers = _build_optimizers(parts, weight_decay)
        self._name, self._model, self._checkpoint = name, model, checkpoint
        self._pace, self._rate = pace, rate
        self._log = _Log(pace.log_every_s)
        self._start, self._saved = time.process_time(), 0.0
        self.progress = 0.0  # from 0 to 1

    @property
    def is_over(self) -> bool:
        return self.progress >= 1

    @property
    def _minutes_spent(self) -> float:
        return (time.process_time() - self._start) / 60 / self._pace.threads

    def step(self, loss: torch.Tensor, **report: float) -> None:
        """Make one optimizer step on `loss`; the numbers in `report` are logged."""
        loss.backward()
        spent = self._minutes_spent
        self.progress = partners.average_gradients(self._parameters, spent / self._pace.minutes)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(self.progress, self._rate) * group["share"]
            optimizer.step()
            optimizer.zero_grad()
        if partners.rank() > 0:
            return
        self._log.add(f"{self._name} {spent:5.1f} min", loss=loss.item(), **report)
        if self.is_over or spent > self._saved + SAVE_EVERY_MINUTES:
            self._saved = spent
            save(self._model, self._checkpoint)


def _build_optimizers(
    parts: Iterable[tuple[nn.Module, float]], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for matrices inside blocks, AdamW for the rest."""
    matrices, others = [], []
    for part, share in parts:
        inside = {
            id(linear.weight)
            for blocks in part.modules()
            if isinstance(blocks, nn.ModuleList)
            for linear in blocks.modules()
            if isinstance(linear, nn.Linear)
        }
        parameters = list(part.parameters())
        ours = [parameter for parameter in parameters if id(parameter) in inside]
        rest = [parameter for parameter in parameters if id(parameter) not in inside]
        if ours:
            matrices.append({"params": ours, "share": MATRIX_RATE * share})
        if rest:
            others.append({"params": rest, "share": share})
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    if not matrices:
        return [adamw]
    return [Muon(matrices, weight_decay=weight_decay), adamw]


def rate_at(progress: float, peak: float) -> float:
    """Return the learning rate: linear warm-up to `peak`, then cosine decay to `LAST_RATE`."""
    falling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * min(progress / WARM_UP + 0.01, falling)


def save(model: nn.Module, checkpoint: Path) -> None:
    """Save weights atomically."""
    half = checkpoint.with_suffix(".half")
    torch.save(model.state_dict(), half)
    os.replace(half, checkpoint)


def resume(model: nn.Module, checkpoint: Path) -> None:
    """Load weights, if there is a checkpoint."""
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint))


class _Log:
    """Prints the means of the reported numbers every `every_s` seconds."""

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
