"""Replies on disk: the log that a run appends to and resumes from, and files from elsewhere.

The log has a `Prediction` on each line; of several for one question the last counts, and a line
that a killed process left half written is skipped.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate import judge
from llava_ray.evaluate.reading.files import field, read_json, read_jsonl
from llava_ray.types import Prediction, Question, Score


class Replies(NamedTuple):
    """What files from elsewhere hold: replies, or the scores that a judge gave, by question."""

    predictions: dict[str, Prediction]
    scores: dict[str, Score]


def append_log(path: Path, predictions: Iterable[Prediction]) -> None:
    """Add lines to a log, at once and whole."""
    lines = [
        json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions
    ]
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            lines = lines if file.read(1) == b"\n" else ["\n", *lines]  # after a killed writer
        file.write("".join(lines).encode())
        file.flush()


def read_log(path: Path) -> dict[str, Prediction]:
    """Return the last prediction of each question in a log; none if there is no log."""
    found: dict[str, Prediction] = {}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            prediction = Prediction(**{**row, "image_sha256": tuple(row["image_sha256"])})
        except (ValueError, TypeError, KeyError):
            continue
        found[prediction.question_id] = prediction
    return found


def read_replies(path: Path, questions: Sequence[Question]) -> Replies:
    """Read a file of replies from elsewhere.

    Lines of `question_id` and `text` (LLaVA's answer files), a ScienceQA result (`outputs`),
    MM-Vet's `v1_ID: reply`, LLaVA-Bench reviews (`tuple`) and MM-Vet grades (`score`) are known.

    Raises:
        ConfigError: it is none of these.
        SampleError: a reply belongs to none of the questions.
    """
    if path.suffix == ".json":
        return _read_object(path, read_json(path), questions)
    finder = _Finder(questions, path)
    replies = Replies({}, {})
    for row in read_jsonl(path):
        question = finder.find(field(row, "question_id", path.name), row.get("prompt"))
        if "tuple" in row or "score" in row:
            replies.scores[question.question_id] = judge.judge_points(
                row["tuple"] if "tuple" in row else row["score"]
            )
        text = row.get("text", row.get("prediction", "")) if "tuple" not in row else ""
        replies.predictions[question.question_id] = _answered(question, text)
    return replies


def _read_object(path: Path, content: Any, questions: Sequence[Question]) -> Replies:
    if isinstance(content, dict) and "outputs" in content:
        content = content["outputs"]
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds no replies: give lines of question_id and text, a ScienceQA result, or "
            "MM-Vet's replies or grades"
        )
    finder = _Finder(questions, path)
    replies = Replies({}, {})
    for name, value in content.items():
        question = finder.find(name.removeprefix("v1_"), None)
        if isinstance(value, dict):
            replies.scores[question.question_id] = judge.judge_grades(value["score"])
        text = value if isinstance(value, str) else ""
        replies.predictions[question.question_id] = _answered(question, text)
    return replies


class _Finder:
    """Finds the question that a reply belongs to: by id, and by prompt where ids repeat."""

    def __init__(self, questions: Sequence[Question], path: Path) -> None:
        self._path = path
        self._left: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            self._left[question.source_id].append(question)

    def find(self, source_id: object, prompt: str | None) -> Question:
        left = self._left[str(source_id)]
        if not left:
            raise SampleError(
                f"{self._path} has a reply for {source_id!r}, which the task does not ask, or not "
                "so often: give the answers to the same question file"
            )
        same = [question for question in left if question.text == prompt]
        question = (same or left)[0]
        left.remove(question)
        return question


def _answered(question: Question, text: str) -> Prediction:
    return Prediction(question.question_id, "answered", text)
