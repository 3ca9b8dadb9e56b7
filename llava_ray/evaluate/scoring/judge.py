"""Responses that another model grades: what the judge is asked, and how its verdict is read.

Pure functions. `judge_run` asks the judge; `rescore` takes reviews and grades made elsewhere. A
verdict that cannot be read is not a score: it is counted and reported, and stays out of every mean.

The wording is this project's own, so points given with it are not comparable with published ones.
The setting `judge_wording` replaces it (LLaVA's rule.json for `llava_in_the_wild`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_ray.errors import ConfigError
from llava_ray.types import Question, Sampling, Score

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
    pieces = verdict.split("\n")[0].replace(",", " ").split(" ")
    try:
        reference, model = (float(piece) for piece in pieces)
    except ValueError:
        return _unreadable(verdict, "two numbers on the first line")
    return score_points((reference, model))


def score_points(points: Sequence[float]) -> Score:
    """The score for a pair of points; LLaVA marks a review that failed with negative ones."""
    if len(points) != 2 or min(points) < 0:
        return _unreadable(str(list(points)), "pair of points")
    reference, model = map(float, points)
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
    try:
        return score_grades([float(verdict.split()[0])])
    except (ValueError, IndexError):
        return _unreadable(verdict, "number from 0 to 1")


def score_grades(grades: Sequence[float]) -> Score:
    """The score for one or several grades of one response."""
    if not grades or not all(0 <= grade <= 1 for grade in grades):
        return _unreadable(str(list(grades)), "grades from 0 to 1")
    value = sum(grades) / len(grades)
    return Score(value, f"{value:g}", f"graded {', '.join(f'{grade:g}' for grade in grades)}")


def _unreadable(verdict: str, expected: str) -> Score:
    return Score(None, why=f"the judge gave no {expected}: {verdict[:200]!r}")


REVIEW = Judge(write_review, score_review, Sampling(max_tokens=1024, temperature=0.2), RULE)
GRADING = Judge(write_grading, score_grading, Sampling(max_tokens=8, temperature=0), GRADES)
