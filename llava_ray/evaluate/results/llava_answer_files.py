"""Reads stored predictions: LLaVA's answer files, its results, reviews and grades, and our own.

    a file -> StoredResponse records -> matched with the benchmark's questions -> Prediction, Score

What a file is, its content says: names like `..._output.jsonl` also hold a single JSON object.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_ray.errors import ConfigError, SampleError
from llava_ray.evaluate.datasets.files import get_field, get_text, read_jsonl
from llava_ray.evaluate.datasets.prompts import is_same_question
from llava_ray.evaluate.scoring import judge
from llava_ray.types import Prediction, Question, Score

_FORMS = (
    "lines of question_id and text (LLaVA's answer files), samples or predictions of this program, "
    "a ScienceQA result or its analysis, MM-Vet's responses or grades, LLaVA-Bench reviews"
)
_IDS = ("question_id", "questionId", "id", "img_path", "image")
_TEXTS = ("text", "prediction", "response", "reply", "answer")


class StoredResponse(NamedTuple):
    """A response as a file has it.

    Attributes:
        source_id: of the question.
        text: the response; "" in files that hold a judge's scores only; None: there is none.
        prompt: what was asked; "" if the file does not say.
        group: kind of question, in reviews.
        score: what a judge gave.
        reason: why there is no response.
        is_own: the id is a `Question.question_id`, which names one question.
    """

    source_id: str
    text: str | None
    prompt: str = ""
    group: str = ""
    score: Score | None = None
    reason: str = ""
    is_own: bool = False


class StoredPredictions(NamedTuple):
    """Predictions read from a file, and the scores that a judge gave, by question."""

    predictions: dict[str, Prediction]
    scores: dict[str, Score]


def read_responses(path: Path) -> list[StoredResponse]:
    """Read a file of responses.

    Known forms: lines of `question_id` and `text` (LLaVA's answer files) or `prediction`
    (SEED-Bench's), the samples and predictions of a run of this program, a ScienceQA result
    (`outputs`) or its analysis (`correct`, `incorrect`), MM-Vet's `v1_ID: response`, LLaVA-Bench
    reviews (`tuple`) and MM-Vet grades (`score`).

    Raises:
        ConfigError: it is none of these.
        SampleError: a row of it is not.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file of responses at {path}")
    data = path.read_bytes()
    if data.startswith(b"PK"):
        raise ConfigError(f"{path} is an Excel or zip file: give {_FORMS}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = read_jsonl(path)
    if isinstance(content, dict) and any(name in content for name in _IDS):
        content = [content]  # a file of one line
    if isinstance(content, dict):
        responses = list(_read_object(path, content))
    elif isinstance(content, list):
        responses = [_read_row(row, f"{path}, row {i}") for i, row in enumerate(content, 1)]
    else:
        responses = []
    if not responses:
        raise ConfigError(f"{path} holds no responses: give {_FORMS}")
    return responses


def match_responses(
    rows: Sequence[StoredResponse], questions: Sequence[Question], path: Path
) -> StoredPredictions:
    """Give each response to its question: by id, and by what was asked where ids repeat.

    The order of the responses says nothing.

    Raises:
        SampleError: a response belongs to none of the questions, or it is not clear to which.
    """
    by_id: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        for name in dict.fromkeys((question.source_id, *question.other_ids)):
            by_id[name].append(question)
    own = {question.question_id: question for question in questions}
    stored = StoredPredictions({}, {})
    for row in rows:
        if row.source_id in own and (row.is_own or row.source_id not in by_id):
            candidates = [own[row.source_id]]
        else:
            candidates = by_id.get(row.source_id, [])
        if not candidates:
            raise SampleError(
                f"{path} has a response for {row.source_id!r}, which the benchmark does not ask: "
                "give the answers to the same question file"
            )
        _add(stored, _choose(row, candidates, stored, path), row)
    return stored


def make_questions(rows: Sequence[StoredResponse]) -> tuple[list[Question], StoredPredictions]:
    """Return questions for a judge's scores, whose summary needs no more than their kinds."""
    questions, stored = [], StoredPredictions({}, {})
    for i, row in enumerate(rows):
        groups = (row.group,) if row.group else ()
        questions.append(Question(f"{row.source_id}/{i}", row.prompt, groups=groups))
        _add(stored, questions[-1], row)
    return questions, stored


def _choose(
    row: StoredResponse, candidates: Sequence[Question], stored: StoredPredictions, path: Path
) -> Question:
    """Return the question of this id that was asked with this prompt and has no response yet."""
    if len(candidates) > 1:
        same = [each for each in candidates if is_same_question(each.text, row.prompt)]
        if not same:
            prompt = f"its prompt {row.prompt[:80]!r}" if row.prompt else "a row without a prompt"
            raise SampleError(
                f"{path} has a response for {row.source_id!r}, of which the benchmark asks "
                f"{len(candidates)} questions, and {prompt} fits none: give lines with the prompt"
            )
        candidates = same
    for question in candidates:
        if question.question_id not in stored.predictions:
            return question
    raise SampleError(
        f"{path} has a response for {row.source_id!r} more often than the benchmark asks it: "
        "leave one out"
    )


def _add(stored: StoredPredictions, question: Question, row: StoredResponse) -> None:
    name = question.question_id
    if row.text is None:
        stored.predictions[name] = Prediction(name, "failed", reason=row.reason)
        return
    stored.predictions[name] = Prediction(name, "answered", row.text)
    if row.score is not None:
        stored.scores[name] = row.score


def _read_row(row: Any, where: str) -> StoredResponse:
    if not isinstance(row, dict):
        raise SampleError(f"{where}: {str(row)[:80]!r} is no JSON object: give {_FORMS}")
    key = next((name for name in _IDS if name in row), "question_id")
    source_id = get_text(row, key, where)
    if "tuple" in row or isinstance(row.get("score"), list):
        points = row["tuple"] if "tuple" in row else row["score"]
        group = get_text(row, "category", where, default="").removeprefix("llava_bench_")
        return StoredResponse(source_id, "", group=group, score=judge.score_points(points))
    prompt = get_text(row, "prompt" if "prompt" in row else "question", where, default="")
    is_own = "cache_key" in row
    if row.get("status", "answered") != "answered":
        reason = get_text(row, "reason", where, default="") or f"its status is {row['status']!r}"
        return StoredResponse(source_id, None, prompt, reason=reason, is_own=is_own)
    name = next((name for name in _TEXTS if name in row), "text")
    text, reason = _read_text(get_field(row, name, where), where)
    return StoredResponse(source_id, text, prompt, reason=reason, is_own=is_own)


def _read_object(path: Path, content: dict[str, Any]) -> Iterator[StoredResponse]:
    if isinstance(content.get("correct"), list):
        for i, row in enumerate([*content["correct"], *content.get("incorrect", [])], 1):
            where = f"{path}, entry {i}"
            prompt = get_text(row, "question", where, default="")
            source_id = get_text(row, "question_id", where)
            yield StoredResponse(source_id, get_text(row, "pred", where), prompt)
        return
    found = content.get("outputs", content)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no responses: give {_FORMS}")
    for name, value in found.items():
        source_id, where = name.removeprefix("v1_"), f"{path}, {name}"
        if isinstance(value, dict):
            grades = get_field(value, "score", where)
            yield StoredResponse(source_id, "", score=judge.score_grades(grades))
        else:
            text, reason = _read_text(value, where)
            yield StoredResponse(source_id, text, reason=reason)


def _read_text(value: Any, where: str) -> tuple[str | None, str]:
    """Return a response and ""; or None and why there is none."""
    if value is None:
        return None, "the file holds null in place of a response"
    return get_text({"response": value}, "response", where), ""
