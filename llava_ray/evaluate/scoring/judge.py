"""Responses that another model grades: what the judge is asked, and how its verdict is read.

Pure functions. `judge_run` asks the judge; `rescore` takes reviews and grades made elsewhere. A
verdict that cannot be read is not a score: it is counted and reported, and stays out of every mean.

The wording is this project's own, so points given with it are not comparable with published ones.
The setting `judge_wording` replaces it (LLaVA's rule.json for `llava_in_the_wild`).
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError
from llava_ray.types import Question, Sampling, Score

MAX_POINTS = 10
_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)", re.ASCII)

RULE = """You see what a user asked about a picture, the picture described in sentences, and the \
answers of two assistants. Judge how helpful, relevant, accurate and detailed each answer is.
Give each assistant points from 1 to 10; more points are better.
Write both numbers on the first line, Assistant 1 first, with one space between them and nothing \
else. Then explain your points. Do not let the order of the answers count."""

GRADES = """Grade how correct a prediction is, from 0.0 to 1.0, by comparing it with the ground \
truth. Parts joined by <AND> are all needed for 1.0 and share it equally; of parts joined by <OR> \
one is enough. Write the last column of the last row only.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which animals are there? | dog <AND> cat | a dog | 0.5
Which animals are there? | dog <AND> cat | a cat and a dog | 1.0
Which animals are there? | dog <AND> cat | two horses | 0.0
What is the man holding? | umbrella <OR> parasol | He has a parasol in his hand. | 1.0
Why is it funny? | The bird wears a hat <AND> reads a newspaper like an old man | A bird in a hat \
sits on a bench, as a person would. | 0.6"""


@dataclass(frozen=True)
class Judge:
    """How a judge is asked and understood.

    Attributes:
        write: the text for the judge: (question, response, wording).
        score: what a verdict means; a Score without a value if it cannot be read.
        sampling: how the judge answers.
        wording: the instruction.
    """

    write: Callable[[Question, str, str], str]
    score: Callable[[str], Score]
    sampling: Sampling
    wording: str

    def load_wording(self, path: str | None) -> Callable[[Question], str]:
        """Return the instruction for a question: our own, that of a text, or LLaVA's rules.

        Args:
            path: a text file, or JSON as LLaVA's rule.json: `llava_bench_CATEGORY` -> `prompt`.

        Raises:
            ConfigError: the file cannot be read or is of another kind.
        """
        if path is None:
            return lambda question: self.wording
        try:
            text = Path(path).read_text(encoding="utf-8")
            if not path.endswith(".json"):
                return lambda question: text
            rules = {name: str(rule["prompt"]) for name, rule in json.loads(text).items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"judge_wording={path!r} cannot be read ({error!r}): give a text file, or LLaVA's "
                "rule.json"
            ) from error
        return lambda question: _find_rule(rules, question, path)


def _find_rule(rules: dict[str, str], question: Question, path: str) -> str:
    name = f"llava_bench_{question.groups[0] if question.groups else ''}"
    if name not in rules:
        raise ConfigError(f"{path} has no {name!r}, which question {question.question_id} needs")
    return rules[name]


def write_review(question: Question, text: str, wording: str) -> str:
    """LLaVA-Bench: the image in words, the question, the reference and the response."""
    (reference,) = question.answers
    return (
        f"[Context]\n{question.context}\n\n[Question]\n{question.text}\n\n"
        f"[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n[System]\n{wording}\n\n"
    )


def score_review(verdict: str) -> Score:
    """Two numbers on the first line: the points of the reference and of the model."""
    points = verdict.split("\n")[0].replace(",", " ").split(" ")
    if len(points) != 2 or None in map(read_number, points):
        return _unreadable(verdict, "two numbers on the first line")
    return score_points(points)


def score_points(points: Any) -> Score:
    """Score a pair of points from 0 to 10, the reference's and the model's.

    LLaVA marks a review that failed with negative ones.
    """
    pair = [read_number(each) for each in points] if isinstance(points, list | tuple) else []
    if len(pair) != 2 or any(each is None or not 0 <= each <= MAX_POINTS for each in pair):
        return _unreadable(str(points), f"pair of points from 0 to {MAX_POINTS}")
    reference, model = pair
    assert reference is not None
    assert model is not None
    why = f"reference {reference:g}, model {model:g}"
    return Score(model / 10, f"{model:g}", why, (reference, model))


def write_grading(question: Question, text: str, wording: str) -> str:
    """MM-Vet: a table of examples, and a row whose last cell is missing."""
    (truth,) = question.answers
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    response = " ".join(text.split())
    return f"{wording}\n{' | '.join([question.text, truth, response, ''])}"


def score_grading(verdict: str) -> Score:
    """The first word is a number from 0 to 1."""
    words = verdict.split()
    if not words or read_number(words[0]) is None:
        return _unreadable(verdict, "number from 0 to 1")
    return score_grades(words[:1])


def score_grades(grades: Any) -> Score:
    """Score a response by one grade from 0 to 1, or by the mean of several."""
    given = grades if isinstance(grades, list | tuple) else [grades]
    numbers = [number for each in given if (number := read_number(each)) is not None]
    if not numbers or len(numbers) < len(given) or not all(0 <= each <= 1 for each in numbers):
        return _unreadable(str(grades), "grades from 0 to 1")
    value = sum(numbers) / len(numbers)
    return Score(value, f"{value:g}", f"graded {', '.join(f'{each:g}' for each in numbers)}")


def read_number(value: Any) -> float | None:
    """Return a number, or one written in digits; None for anything else, nan and inf included."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer too large for a float
        return None
    return number if math.isfinite(number) else None


def _unreadable(verdict: str, expected: str) -> Score:
    return Score(None, why=f"the judge gave no {expected}: {verdict[:200]!r}")


REVIEW = Judge(write_review, score_review, Sampling(max_tokens=1024, temperature=0.2), RULE)
GRADING = Judge(write_grading, score_grading, Sampling(max_tokens=8, temperature=0), GRADES)
