"""Scores of replies from elsewhere: no model is asked (`llava-ray evaluate --score-only`)."""

from pathlib import Path

from llava_ray.errors import ConfigError
from llava_ray.evaluate.predictions import read_replies
from llava_ray.evaluate.reading.yes_no import read_mme_results
from llava_ray.evaluate.results import (
    TaskResult,
    describe_sample,
    score_replies,
    summarize_task,
    write_samples,
)
from llava_ray.evaluate.tasks import Task
from llava_ray.types import Prediction


def score_file(
    task: Task, predictions: Path, data: Path, *, min_coverage: float, output: Path | None = None
) -> TaskResult:
    """Score a file of replies (MME: also a folder of its per-task files).

    Args:
        task: whose scorer judges.
        predictions: see `predictions.read_replies`.
        data: the folder of all benchmarks, or of this one.
        min_coverage: with a smaller share of scored questions there is no headline.
        output: folder for samples_{task}.jsonl and .parquet.

    Raises:
        ConfigError: a file is missing or of another kind.
        SampleError: replies and questions do not belong together.
    """
    if not predictions.exists():
        raise ConfigError(f"there is no file of replies at {predictions}")
    if task.name == "mme" and (predictions.is_dir() or predictions.suffix == ".txt"):
        pairs = list(read_mme_results(predictions))
        questions = [question for question, _ in pairs]
        replies = {q.question_id: Prediction(q.question_id, "answered", text) for q, text in pairs}
        scores = score_replies(task, questions, replies)
    else:
        questions = task.read(task.find_folder(data))
        replies, judged = read_replies(predictions, questions)
        scores = score_replies(task, questions, replies) | judged
        if task.judge and not judged:
            raise ConfigError(
                f"{task.name} is graded by a judge, and {predictions} holds replies without "
                "grades: give the file of reviews or grades"
            )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        ids = [question.question_id for question in questions]
        samples = [
            describe_sample(question, replies.get(i), scores.get(i))
            for question, i in zip(questions, ids, strict=True)
        ]
        write_samples(output / f"samples_{task.name}.jsonl", samples)
    return summarize_task(task, questions, replies, scores, min_coverage=min_coverage)
