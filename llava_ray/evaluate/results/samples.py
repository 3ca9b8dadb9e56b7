"""Reads samples_{task}.jsonl and results.json of a finished run, to report and compare."""

from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError
from llava_ray.evaluate.datasets.files import read_json, read_jsonl
from llava_ray.evaluate.scoring.metrics import Scored
from llava_ray.types import Question, Score

SampleRecord = dict[str, Any]
PREFIX = "samples_"


def find_samples(folder: Path) -> dict[str, Path]:
    """Return the file of samples of each task in a folder of results.

    Raises:
        ConfigError: the folder has none.
    """
    files = {
        path.stem.removeprefix(PREFIX): path for path in sorted(folder.glob(f"{PREFIX}*.jsonl"))
    }
    if not files:
        raise ConfigError(f"{folder} has no results: give the --output of an evaluation")
    return files


def read_samples(path: Path) -> list[SampleRecord]:
    """Return the samples of a task, as `results.describe_sample` wrote them."""
    return [_rename_fields(record) for record in read_jsonl(path)]


def read_results(folder: Path) -> dict[str, Any]:
    """Return results.json of a run; an empty one if it does not exist."""
    path = folder / "results.json"
    return read_json(path) if path.is_file() else {"about": {}, "tasks": {}}


def to_scored(sample: SampleRecord) -> Scored | None:
    """Return a sample as a scored row; None if it has no score."""
    if sample["status"] != "answered" or sample["score"] is None:
        return None
    question = Question(
        sample["id"],
        sample["prompt"],
        answers=tuple(sample["answers"]),
        choices=tuple(sample["choices"]),
        groups=tuple(sample["groups"]),
        cluster=sample["cluster"],
    )
    score = Score(
        sample["score"],
        sample["parsed"],
        sample["why"],
        tuple(sample["figures"]),
        is_unread=sample.get("is_unread", False),
    )
    return Scored(question, sample["response"], score)


def _rename_fields(record: SampleRecord) -> SampleRecord:
    """Version 0.1 wrote the response under "reply"."""
    return {("response" if name == "reply" else name): value for name, value in record.items()}
