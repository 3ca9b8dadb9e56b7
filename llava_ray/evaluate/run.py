"""A run of tasks, the spine of evaluation: questions -> actors -> log -> scores -> results.

Killed at any point and started again, it asks only what the log does not hold; replies that are
there are scored anew, never predicted again.
"""

import asyncio
import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from llava_ray.config import EvaluateConfig
from llava_ray.errors import ConfigError, ImageError
from llava_ray.evaluate.digest import digest_model
from llava_ray.evaluate.pictures import load_picture
from llava_ray.evaluate.predict import Predictor, describe_settings, make_cache_key
from llava_ray.evaluate.predictions import append_log, read_log
from llava_ray.evaluate.results import (
    TaskResult,
    describe_sample,
    score_replies,
    summarize_task,
    write_results,
    write_samples,
)
from llava_ray.evaluate.tasks import Task, find_tasks
from llava_ray.types import Prediction, Question

BATCHES_AT_ONCE = 2


class Progress(NamedTuple):
    """How far a task is: questions that have a prediction, of all."""

    task: str
    num_done: int
    num_questions: int


def evaluate(
    config: EvaluateConfig, *, on_progress: Callable[[Progress], None] = lambda _: None
) -> list[TaskResult]:
    """Run all tasks of a configuration and write their results below `config.output`.

    Raises:
        ConfigError: no such task, model or file.
        UserError: no server answers.
    """
    tasks = [(task, _read(task, config)) for task in find_tasks(config.tasks)]
    model = _find_model(config)
    digest = digest_model(config, model)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for task, questions in tasks:
        log = output / f"predictions_{task.name}.jsonl"
        predict(task, questions, config, model, digest, log, on_progress)
        results.append(_score(task, questions, config, output, read_log(log)))
        about = {"model": config.endpoint or config.app or config.model, "name": model}
        write_results(output / "results.json", results, {**about, "model_digest": digest})
    return results


def predict(
    task: Task,
    questions: Sequence[Question],
    config: EvaluateConfig,
    model: str,
    digest: str,
    log: Path,
    on_progress: Callable[[Progress], None],
) -> None:
    """Ask what the log has no answer to, and add what comes back to it as it comes."""
    open_questions = _find_open(
        questions, read_log(log), digest, describe_settings(config, task.sampling)
    )
    num_done = len(questions) - len(open_questions)
    on_progress(Progress(task.name, num_done, len(questions)))
    for predictions in _stream(open_questions, task, config, model, digest):
        append_log(log, predictions)
        num_done += len(predictions)
        on_progress(Progress(task.name, num_done, len(questions)))


def _stream(
    questions: Sequence[Question], task: Task, config: EvaluateConfig, model: str, digest: str
) -> Iterator[list[Prediction]]:
    """Yield predictions a batch at a time, in the order in which they are done."""
    if not questions:
        return
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    num_blocks = -(-len(questions) // config.concurrency)
    rows = [{"question": pickle.dumps(question)} for question in questions]
    answered = ray.data.from_items(rows, override_num_blocks=num_blocks).map_batches(
        Predictor,  # type: ignore[arg-type]  # a class is what Ray Data starts as an actor
        fn_constructor_args=(config, model, task.sampling, digest),
        batch_size=config.concurrency,
        compute=ray.data.ActorPoolStrategy(
            size=config.num_actors, max_concurrent_calls_per_actor=BATCHES_AT_ONCE
        ),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
    )
    for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
        yield [pickle.loads(each) for each in batch["prediction"]]


def _find_open(
    questions: Sequence[Question], known: dict[str, Prediction], digest: str, settings: str
) -> list[Question]:
    """The questions without an answer that still holds for this model and these pictures."""

    def is_open(question: Question) -> bool:
        prediction = known.get(question.question_id)
        if prediction is None or prediction.status != "answered":
            return True
        try:
            shas = [_hash_picture(each) for each in question.images]
        except ImageError:
            return True
        return prediction.cache_key != make_cache_key(digest, question, shas, settings)

    return [question for question in questions if is_open(question)]


@lru_cache(maxsize=100_000)
def _hash_picture(picture: bytes | str) -> str:
    return hashlib.sha256(load_picture(picture)).hexdigest()


def _read(task: Task, config: EvaluateConfig) -> list[Question]:
    questions = task.read(task.find_folder(Path(config.data)))
    questions = questions[: config.limit] if config.limit else questions
    ids = {question.question_id for question in questions}
    if len(ids) < len(questions):
        raise ConfigError(
            f"{task.name} has {len(questions)} questions but {len(ids)} ids: make them unique"
        )
    return questions


def _score(
    task: Task,
    questions: Sequence[Question],
    config: EvaluateConfig,
    output: Path,
    predictions: dict[str, Prediction],
) -> TaskResult:
    scores = score_replies(task, questions, predictions)
    samples = [
        describe_sample(q, predictions.get(q.question_id), scores.get(q.question_id))
        for q in questions
    ]
    write_samples(output / f"samples_{task.name}.jsonl", samples)
    if task.submit:
        replies = {i: p.text for i, p in predictions.items() if p.status == "answered"}
        task.submit(
            questions, replies, task.find_folder(Path(config.data)), output / f"submit_{task.name}"
        )
    return summarize_task(task, questions, predictions, scores, min_coverage=config.min_coverage)


def _find_model(config: EvaluateConfig) -> str:
    """The name by which the model is asked."""
    if config.endpoint:
        return config.model_name or asyncio.run(_ask_name(config.endpoint))
    return config.model_name or config.describe_model().name


async def _ask_name(endpoint: str) -> str:
    from llava_ray.client import Client

    async with Client(endpoint) as client:
        names = await client.list_models()
    if not names:
        raise ConfigError(f"the server at {endpoint} serves no model: name one with --model-name")
    return names[0]
