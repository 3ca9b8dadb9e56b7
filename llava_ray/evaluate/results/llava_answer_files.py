"""Reads stored predictions: LLaVA's answer files, its results, reviews and grades."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate.datasets.files import get_field, read_json, read_jsonl
from llava_ray.evaluate.scoring import judge
from llava_ray.types import Prediction, Question, Score


class StoredResponse(NamedTuple):
    """A response as a file has it.

    Attributes:
        source_id: of the question.
        text: the response; "" in files that hold no more than a judge's scores.
        prompt: what was asked; "" if the file does not say.
        group: kind of question, in reviews.
        score: what a judge gave.
    """

    source_id: str
    text: str
    prompt: str = ""
    group: str = ""
    score: Score | None = None


class StoredPredictions(NamedTuple):
    """Predictions read from a file, and the scores that a judge gave, by question."""

    predictions: dict[str, Prediction]
    scores: dict[str, Score]


def read_responses(path: Path) -> list[StoredResponse]:
    """Read a file of responses.

    Known forms: lines of `question_id` and `text` (LLaVA's answer files) or `prediction`
    (SEED-Bench's), a ScienceQA result (`outputs`) or its analysis (`correct`, `incorrect`),
    MM-Vet's `v1_ID: response`, LLaVA-Bench reviews (`tuple`) and MM-Vet grades (`score`).

    Raises:
        ConfigError: it is none of these.
        SampleError: a row of it is not.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file of responses at {path}")
    if path.suffix == ".json":
        return list(_read_object(path, read_json(path)))
    return [_read_line(row, f"{path}, row {i}") for i, row in enumerate(read_jsonl(path), 1)]


def match_responses(
    rows: Sequence[StoredResponse], questions: Sequence[Question], path: Path
) -> StoredPredictions:
    """Give each response to its question: by id, and by what was asked where ids repeat.

    Raises:
        SampleError: a response belongs to none of the questions.
    """
    left: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        left[question.source_id].append(question)
    responses = StoredPredictions({}, {})
    for row in rows:
        candidates = left[row.source_id]
        if not candidates:
            raise SampleError(
                f"{path} has a response for {row.source_id!r}, which the benchmark does not ask, "
                "or not so often: give the answers to the same question file"
            )
        same = [question for question in candidates if question.text == row.prompt]
        question = (same or candidates)[0]
        candidates.remove(question)
        _add(responses, question, row)
    return responses


def make_questions(rows: Sequence[StoredResponse]) -> tuple[list[Question], StoredPredictions]:
    """Return questions for a judge's scores, whose summary needs no more than their kinds."""
    questions, responses = [], StoredPredictions({}, {})
    for i, row in enumerate(rows):
        groups = (row.group,) if row.group else ()
        questions.append(Question(f"{row.source_id}/{i}", row.prompt, groups=groups))
        _add(responses, questions[-1], row)
    return questions, responses


def _add(responses: StoredPredictions, question: Question, row: StoredResponse) -> None:
    name = question.question_id
    responses.predictions[name] = Prediction(name, "answered", row.text)
    if row.score is not None:
        responses.scores[name] = row.score


def _read_line(row: dict[str, Any], where: str) -> StoredResponse:
    source_id = str(get_field(row, "question_id", where))
    if "tuple" in row or isinstance(row.get("score"), list):
        points = row["tuple"] if "tuple" in row else row["score"]
        group = row.get("category", "").removeprefix("llava_bench_")
        return StoredResponse(source_id, "", group=group, score=judge.score_points(points))
    text = row["prediction"] if "prediction" in row else get_field(row, "text", where)
    return StoredResponse(source_id, text, row.get("prompt", ""))


def _read_object(path: Path, content: Any) -> Iterator[StoredResponse]:
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds no responses: give lines of question_id and text, a ScienceQA result, "
            "or MM-Vet's responses or grades"
        )
    if "correct" in content and isinstance(content["correct"], list):
        for row in [*content["correct"], *content["incorrect"]]:
            yield StoredResponse(str(row["question_id"]), row["pred"], row["question"])
        return
    for name, value in content.get("outputs", content).items():
        source_id = name.removeprefix("v1_")
        if isinstance(value, dict):
            grades = get_field(value, "score", f"{path}, {name}")
            yield StoredResponse(source_id, "", score=judge.score_grades(grades))
        else:
            yield StoredResponse(source_id, str(value))
