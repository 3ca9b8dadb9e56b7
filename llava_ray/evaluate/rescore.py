"""Scores stored predictions without asking the model (`llava-ray evaluate --score-only`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from llava_ray.config import TasksConfig
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
from llava_ray.evaluate.scoring.judge_run import grade_predictions
from llava_ray.evaluate.submission import write_submission
from llava_ray.evaluate.tasks import Task
from llava_ray.types import Prediction, Question, Score


def score_file(
    task: Task,
    predictions: Path,
    data: Path | None = None,
    *,
    min_coverage: float,
    output: Path | None = None,
    judging: TasksConfig | None = None,
    on_verdict: Callable[[int, int], None] = lambda done, of: None,
) -> TaskResult:
    """Score a file of predictions.

    Args:
        task: the benchmark that they answer.
        predictions: see `read_responses`; for MME also the folder of its per-task files.
        data: the folder of all benchmarks, or of this one. MME's per-task files and a judge's
            scores hold all that is needed, but with `data` missing scores are noticed.
        min_coverage: with a smaller share of scored questions there is no headline.
        output: folder for samples, results.json, report.html, the judge's verdicts and the file
            for the benchmark's server, as a run writes them.
        judging: the judge that grades responses without a grade, and the `limit` of questions.
        on_verdict: called with the number of graded responses and of all.

    Raises:
        ConfigError: a file is missing or of another kind.
        SampleError: responses and questions do not belong together.
    """
    questions, stored = _read(task, predictions, data)
    questions = questions[: judging.limit if judging else None]
    scores = score_predictions(task, questions, stored.predictions) | stored.scores
    if task.judge and not stored.scores:
        scores = _grade(task, predictions, questions, stored, output, judging, on_verdict)
    result = summarize_task(task, questions, stored.predictions, scores, min_coverage=min_coverage)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_task_samples(output, task, questions, stored.predictions, scores)
        if task.submit and data is not None and not stored.scores:
            written, note = write_submission(
                task.submit,
                questions,
                stored.predictions,
                task.find_folder(data),
                output / f"submit_{task.name}",
            )
            result = replace(result, submission=written, note=note)
        write_results(output / "results.json", [result], {"name": "stored predictions"})
        write_report(output)
    return result


def _grade(
    task: Task,
    path: Path,
    questions: Sequence[Question],
    stored: StoredPredictions,
    output: Path | None,
    judging: TasksConfig | None,
    on_verdict: Callable[[int, int], None],
) -> dict[str, Score]:
    """Return a judge's scores; none where all that is wanted is the file for a server."""
    assert task.judge is not None
    if judging is None or judging.judge_endpoint is None:
        if output is not None and task.submit is not None:
            return {}
        raise ConfigError(
            f"{task.name} is graded by a judge, and {path} holds responses without grades: give "
            "the file of reviews or grades, or name a judge with --judge-endpoint"
        )
    if output is None:
        raise ConfigError("name a folder for the judge's verdicts with --output")
    output.mkdir(parents=True, exist_ok=True)
    log = output / f"verdicts_{task.name}.jsonl"
    return grade_predictions(
        task.judge, questions, stored.predictions, judging, log, on_verdict=on_verdict
    )


def _read(
    task: Task, path: Path, data: Path | None
) -> tuple[Sequence[Question], StoredPredictions]:
    if task.name == "mme" and (path.is_dir() or path.suffix == ".txt"):
        pairs = list(read_mme_results(path))
        answered = {
            question.question_id: Prediction(question.question_id, "answered", text)
            for question, text in pairs
            if text is not None
        }
        return [question for question, _ in pairs], StoredPredictions(answered, {})
    rows = read_responses(path)
    if data is not None:
        questions = task.read_all(data)
        stored = match_responses(rows, questions, path)
        return task.select(questions), stored
    if task.judge and any(row.score for row in rows):
        return make_questions(rows)
    raise ConfigError(f"{task.name} needs the benchmark's files: name their folder with --data")
