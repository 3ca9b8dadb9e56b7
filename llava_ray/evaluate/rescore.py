"""Scores stored predictions without asking a model (`llava-ray evaluate --score-only`)."""

from collections.abc import Sequence
from pathlib import Path

from llava_ray.errors import ConfigError
from llava_ray.evaluate.datasets.yes_no import read_mme_results
from llava_ray.evaluate.results.llava_answer_files import (
    StoredPredictions,
    make_questions,
    match_responses,
    read_responses,
)
from llava_ray.evaluate.results.report import write_report
from llava_ray.evaluate.results.results import (
    TaskResult,
    score_predictions,
    summarize_task,
    write_results,
    write_task_samples,
)
from llava_ray.evaluate.tasks import Task
from llava_ray.types import Prediction, Question


def score_file(
    task: Task,
    predictions: Path,
    data: Path | None = None,
    *,
    min_coverage: float,
    output: Path | None = None,
) -> TaskResult:
    """Score a file of predictions.

    Args:
        task: the benchmark that they answer.
        predictions: see `predictions.read_responses`; MME: also the folder of its per-task files.
        data: the folder of all benchmarks, or of this one. MME's per-task files and a judge's
            scores hold all that is needed; with `data` missing ones are noticed.
        min_coverage: with a smaller share of scored questions there is no headline.
        output: folder for samples, results.json and report.html, as a run writes them.

    Raises:
        ConfigError: a file is missing or of another kind.
        SampleError: responses and questions do not belong together.
    """
    questions, stored = _read(task, predictions, data)
    scores = score_predictions(task, questions, stored.predictions) | stored.scores
    if task.judge and not stored.scores:
        raise ConfigError(
            f"{task.name} is graded by a judge, and {predictions} holds responses without grades: "
            "give the file of reviews or grades"
        )
    result = summarize_task(task, questions, stored.predictions, scores, min_coverage=min_coverage)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_task_samples(output, task, questions, stored.predictions, scores)
        write_results(output / "results.json", [result], {"name": "stored predictions"})
        write_report(output)
    return result


def _read(
    task: Task, path: Path, data: Path | None
) -> tuple[Sequence[Question], StoredPredictions]:
    if task.name == "mme" and (path.is_dir() or path.suffix == ".txt"):
        pairs = list(read_mme_results(path))
        answered = {q.question_id: Prediction(q.question_id, "answered", text) for q, text in pairs}
        return [question for question, _ in pairs], StoredPredictions(answered, {})
    rows = read_responses(path)
    if data is not None:
        questions = task.read_all(data)
        responses = match_responses(rows, questions, path)
        return task.select(questions), responses
    if task.judge and any(row.score for row in rows):
        return make_questions(rows)
    raise ConfigError(f"{task.name} needs the benchmark's files: name their folder with --data")
