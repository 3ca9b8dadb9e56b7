"""Scores predictions and writes the results of a task: samples, metrics, Parquet."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_ray.evaluate.datasets.files import read_json
from llava_ray.evaluate.output_files import to_utf8, write_json, write_json_lines
from llava_ray.evaluate.scoring.metrics import Scored
from llava_ray.evaluate.scoring.statistics import Estimate, estimate
from llava_ray.evaluate.tasks import Task
from llava_ray.storage import open_folder
from llava_ray.types import Prediction, Question, Score


@dataclass(frozen=True)
class TaskResult:
    """The results of one task.

    Attributes:
        task: its name.
        metrics: each metric with its standard error; the first is the headline.
        num_questions: number of questions in the task.
        num_scored: answered and scored; only these enter the numbers.
        statuses: questions by what became of them; "unjudged" if no verdict could be read.
        reasons: why questions were not answered or scored, and how often.
        num_unread: scored responses out of which no answer could be read; they count as wrong.
        is_covered: enough questions were scored for a headline.
        submission: the file for the benchmark's server, if one was written.
        note: why there is no such file, where there should be one.
    """

    task: str
    metrics: dict[str, Estimate]
    num_questions: int
    num_scored: int
    statuses: dict[str, int]
    reasons: dict[str, int] = field(default_factory=dict)
    num_unread: int = 0
    is_covered: bool = True
    submission: str = ""
    note: str = ""

    @property
    def num_answered(self) -> int:
        return self.statuses.get("answered", 0) + self.statuses.get("unjudged", 0)

    @property
    def problem(self) -> str:
        """Why the task has no usable result; "" if it has one."""
        reason = f": {next(iter(self.reasons))}" if self.reasons else ""
        if not self.num_answered:
            return f"{self.task}: none of its {self.num_questions} questions was answered{reason}"
        if self.note:
            return f"{self.task}: there is no file for its server: {self.note}"
        if self.is_covered or (self.submission and not self.num_scored):
            return ""
        if not self.num_scored:
            return f"{self.task}: nothing was scored{reason}"
        return (
            f"{self.task}: only {self.num_scored} of {self.num_questions} questions were scored, "
            f"too few for a headline{reason}; --min-coverage sets how many are enough, and a sum "
            "of subtasks needs them all"
        )

    @property
    def coverage(self) -> float:
        return self.num_scored / self.num_questions if self.num_questions else 0.0

    @property
    def headline(self) -> tuple[str, Estimate] | None:
        """The task's main metric; None if too few questions were scored."""
        return next(iter(self.metrics.items()), None) if self.is_covered else None


def score_predictions(
    task: Task, questions: Sequence[Question], predictions: Mapping[str, Prediction]
) -> dict[str, Score]:
    """Score every answered question whose right answer is known; a judge's tasks are not scored."""
    answered = [
        (question, prediction.text)
        for question in questions
        if question.answers
        and (prediction := predictions.get(question.question_id))
        and prediction.status == "answered"
    ]
    if task.score:
        return {question.question_id: task.score(question, text) for question, text in answered}
    if task.score_together and answered:
        asked, texts = zip(*answered, strict=True)
        scores = task.score_together(asked, texts)
        return {q.question_id: score for q, score in zip(asked, scores, strict=True)}
    return {}


def summarize_task(
    task: Task,
    questions: Sequence[Question],
    predictions: Mapping[str, Prediction],
    scores: Mapping[str, Score],
    *,
    min_coverage: float,
) -> TaskResult:
    """Return the results of a task; only answered questions with a score enter the metrics."""
    rows: list[Scored] = []
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for question in questions:
        prediction = predictions.get(question.question_id)
        score = scores.get(question.question_id)
        status = prediction.status if prediction else "missing"
        if prediction and status == "answered" and score is not None:
            if score.value is None:
                status = "unjudged"
                reasons[score.why] += 1
            else:
                rows.append(Scored(question, prediction.text, score))
        elif prediction and prediction.reason:
            reasons[prediction.reason] += 1
        statuses[status] += 1
    metrics = (
        estimate(rows, task.summarize, cluster_of=name_cluster, groups_of=list_groups)
        if rows
        else {}
    )
    return TaskResult(
        task.name,
        metrics,
        len(questions),
        len(rows),
        dict(statuses),
        dict(reasons.most_common(20)),
        num_unread=sum(row.score.is_unread for row in rows),
        is_covered=bool(rows)
        and len(rows) >= (1 if task.needs_all else min_coverage) * len(questions),
    )


def describe_sample(
    question: Question, prediction: Prediction | None, score: Score | None
) -> dict[str, Any]:
    """Return a line of samples_{task}.jsonl: all that rescoring or comparing needs."""
    fields = asdict(prediction) if prediction else {"status": "missing", "text": ""}
    fields.pop("question_id", None)
    return {
        "id": question.question_id,
        "prompt": question.text,
        "images": list(question.images),
        "answers": list(question.answers),
        "choices": list(question.choices),
        "groups": list(question.groups),
        "cluster": question.cluster,
        "response": fields.pop("text"),
        **fields,
        "score": score.value if score else None,
        "parsed": score.parsed if score else "",
        "why": score.why if score else "",
        "figures": list(score.figures) if score else [],
        "is_unread": score.is_unread if score else False,
    }


def write_task_samples(
    output: Path,
    task: Task,
    questions: Sequence[Question],
    predictions: Mapping[str, Prediction],
    scores: Mapping[str, Score],
) -> None:
    """Write samples_{task}.jsonl and .parquet into a folder."""
    samples = [
        describe_sample(q, predictions.get(q.question_id), scores.get(q.question_id))
        for q in questions
    ]
    write_samples(output / f"samples_{task.name}.jsonl", samples)


def write_samples(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write the samples as JSON lines, and as Parquet beside them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_json_lines(path, samples)
    table = pa.Table.from_pylist([to_utf8(dict(sample)) for sample in samples])
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    parquet = path.with_suffix(".parquet")
    open_folder(str(parquet.parent)).write(parquet.name, buffer.getvalue().to_pybytes())


def write_results(path: Path, results: Sequence[TaskResult], about: Mapping[str, Any]) -> None:
    """Write results.json: the results of all tasks, and which model they are of.

    Tasks that the file already holds are kept if `about` is the same.
    """
    before = read_json(path) if path.is_file() else {}
    tasks = before["tasks"] if before.get("about") == about else {}
    tasks |= {result.task: _describe(result) for result in results}
    write_json(path, {"about": dict(about), "tasks": tasks}, indent=2)


def _describe(result: TaskResult) -> dict[str, Any]:
    headline = result.headline
    return {
        "headline": headline and {"name": headline[0], **headline[1]._asdict()},
        "coverage": result.coverage,
        "num_questions": result.num_questions,
        "num_scored": result.num_scored,
        "statuses": result.statuses,
        "num_unread": result.num_unread,
        "reasons": result.reasons,
        "submission": result.submission,
        "note": result.note,
        "metrics": {name: number._asdict() for name, number in result.metrics.items()},
    }


def list_groups(row: Scored) -> tuple[str, ...]:
    """Return the groups by which a row's score is broken down."""
    return row.question.groups


def name_cluster(row: Scored) -> str:
    """Return what a row shares with those that are not independent of it."""
    return row.question.cluster or f"\0{row.question.question_id}"
