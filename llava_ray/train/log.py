"""The log of a run: one line per step in `train_log.jsonl`, on the console and in trackers.

When a run resumes, lines after its checkpoint's step are removed, so each step appears once.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_ray.train.evaluation import GeneratedAnswer
from llava_ray.train.param_groups import ParamGroupSummary
from llava_ray.train.train_step import StepMetrics

LOG = "train_log.jsonl"
_NUMBERS = (
    "loss", "learning_rate", "grad_norm", "tokens_per_s", "samples_per_s", "padding", "mfu",
    "wait_s", "step_s",
)  # fmt: skip


class StepTimes(NamedTuple):
    """How long a step waited for data, the log and other workers, and then computed, in seconds."""

    wait_s: float
    step_s: float


class StepLine(NamedTuple):
    """A step as the log has it; what is said by the second counts its waiting too."""

    step: int
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    wait_s: float
    step_s: float
    tokens_per_s: float
    samples_per_s: float
    padding: float
    mfu: float
    num_learned: int
    sample_ids: tuple[str, ...]
    dropped: dict[str, str]

    @staticmethod
    def make(
        step: int, figures: StepMetrics, times: StepTimes, *, rate: float, mfu: float
    ) -> "StepLine":
        """Return the line of a step.

        Args:
            step: its number, from 1.
            figures: what it was.
            times: how long it took.
            rate: the highest learning rate at that step.
            mfu: see `flops`; 0 if unknown.
        """
        num_places = figures.num_tokens + figures.num_padding
        return StepLine(
            step=step,
            loss=figures.loss,
            learning_rate=rate,
            grad_norm=figures.grad_norm,
            wait_s=round(times.wait_s, 4),
            step_s=round(times.step_s, 4),
            tokens_per_s=round(figures.num_tokens / sum(times), 1),
            samples_per_s=round(figures.num_samples / sum(times), 3),
            padding=round(figures.num_padding / max(1, num_places), 4),
            mfu=round(mfu, 4),
            num_learned=figures.num_learned,
            sample_ids=figures.sample_ids,
            dropped=figures.dropped,
        )


def print_line(text: str) -> None:
    """Write a line to standard output; Ray Train's own `print` writes each line twice."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class RunLog:
    """The log of one worker; only the first one's is written anywhere."""

    def __init__(
        self,
        folder: Path | None,
        *,
        say: Callable[[str], None] = print_line,
        trackers: Sequence[Any] = (),
        send: Callable[[], None] = lambda: None,
        every: int = 1,
    ) -> None:
        self._path = folder / LOG if folder else None
        self._say = say
        self._trackers = trackers
        self._send = send
        self._every = every
        self._num_steps = 0
        self._started_s = time.perf_counter()
        self._first = 0
        self._dropped: Counter[str] = Counter()
        self._num_said = 0

    def begin(
        self, param_groups: Sequence[ParamGroupSummary], *, num_steps: int, step: int
    ) -> None:
        """Print what is trained; drop the log's lines after `step`, where the run resumes."""
        self._num_steps, self._first = num_steps, step
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for group in param_groups:
            self._say(group.describe())
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _read_step(line) <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept))
        self._say(f"step {step} of {num_steps}")

    def write(self, line: StepLine) -> None:
        """Add a step."""
        if self._path is None:
            return
        self._append(line._asdict())
        self._dropped.update(line.dropped.values())
        if line.step % self._every and line.step != self._num_steps:
            return
        spent_s = time.perf_counter() - self._started_s
        left_s = spent_s / (line.step - self._first) * (self._num_steps - line.step)
        used = f"MFU {line.mfu:.0%}  " if line.mfu else ""
        loss = "none, no sample was usable" if line.loss is None else f"{line.loss:.4f}"
        self._say(
            f"step {line.step}/{self._num_steps}  loss {loss}  "
            f"lr {line.learning_rate:.2e}  {line.tokens_per_s:,.0f} tokens/s  "
            f"{line.samples_per_s:.1f} samples/s  padding {line.padding:.0%}  "
            f"{used}{left_s / 60:.1f} min left"
        )
        self._say_dropped()
        figures = {n: v for n in _NUMBERS if (v := getattr(line, n)) is not None}
        for tracker in self._trackers:
            tracker.write(figures, line.step)

    def _say_dropped(self) -> None:
        """Print how many samples were left out since this worker began, if that has changed."""
        num = self._dropped.total()
        if num > self._num_said:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in self._dropped.most_common())
            self._say(f"  {num:,} samples left out so far: {reasons}; ids are in {LOG}")
        self._num_said = num

    def write_evaluation(self, step: int, loss: float) -> None:
        """Add the loss on held-out data."""
        if self._path is None:
            return
        if loss != loss:
            self._say(f"step {step}/{self._num_steps}  no eval_loss: no held-out sample was usable")
            return
        self._append({"step": step, "eval_loss": loss})
        self._say(f"step {step}/{self._num_steps}  eval_loss {loss:.4f}")
        for tracker in self._trackers:
            tracker.write({"eval_loss": loss}, step)

    def write_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        """Add what the model says to a few held-out questions."""
        if self._path is None:
            return
        self._append({"step": step, "answers": [answer._asdict() for answer in answers]})
        for answer in answers:
            self._say(f"  {answer.sample_id}: {answer.said!r}, expected {answer.right!r}")

    def flush(self) -> None:
        """Let everything written so far reach its place."""
        for tracker in self._trackers:
            tracker.flush()
        if self._path is not None:
            self._send()

    def close(self) -> None:
        """Say to trackers that the run is over, or goes on in another worker."""
        for tracker in self._trackers:
            tracker.close()

    def _append(self, content: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a") as file:
            file.write(json.dumps(content) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def _read_step(line: str) -> int:
    """Return a line's step; that of one cut short counts as never reached."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 2**62
