"""Runs an evaluation: questions -> actors -> prediction log -> scores -> results, task by task.

A run that was killed can be started again: it asks only the questions that have no valid prediction
in the log. Scores are always computed again from the log.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llava_ray.client import Client
from llava_ray.cluster import choose_num_gpus
from llava_ray.config import EvaluateConfig, TasksConfig
from llava_ray.errors import ConfigError, ImageError, LlavaRayError, UserError
from llava_ray.evaluate.datasets.images import hash_image
from llava_ray.evaluate.predict.actor import Predictor
from llava_ray.evaluate.predict.ask import run_async
from llava_ray.evaluate.predict.cache_key import (
    describe_settings,
    digest_model,
    is_known_by_weights,
    make_cache_key,
)
from llava_ray.evaluate.predict.crashes import SharedCrashCounter
from llava_ray.evaluate.predict.log import append_log, read_log
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
from llava_ray.evaluate.tasks import Task, find_tasks
from llava_ray.types import Prediction, Question

BATCHES_AT_ONCE = 2


class EvaluateProgress(NamedTuple):
    """Progress of a task: how many of its questions have a prediction."""

    task: str
    num_done: int
    num_questions: int


def evaluate_model(
    config: EvaluateConfig,
    *,
    on_progress: Callable[[EvaluateProgress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> list[TaskResult]:
    """Run all tasks of a configuration and write their results below `config.output`.

    Args:
        config: of the run.
        on_progress: called after each batch of predictions.
        on_note: called with what the user should know, a sentence.

    Raises:
        ConfigError: no such task, model or file.
        UserError: no server answers, or no question of a task was answered; the results are
            written all the same.
    """
    tasks = [(task, read_questions(task, config)) for task in find_tasks(config.tasks)]
    model = _find_model(config)
    digest = digest_model(config, model)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    if not is_known_by_weights(config, digest):
        on_note(_describe_reuse(config))
    results = []
    for task, questions in tasks:
        predict(task, questions, config, model, digest, _find_log(output, task), on_progress)
        results.append(_score(task, questions, config, output, on_progress))
        write_results(output / "results.json", results, _describe_run(config, model, digest))
    write_report(output)
    if unanswered := [result.problem for result in results if not result.num_answered]:
        raise UserError("; ".join(unanswered))
    return results


def predict(
    task: Task,
    questions: Sequence[Question],
    config: EvaluateConfig,
    model: str,
    digest: str,
    log: Path,
    on_progress: Callable[[EvaluateProgress], None],
) -> None:
    """Ask the questions without a valid prediction in the log; append each batch as it finishes."""
    known: dict[str, Prediction] = {}
    if config.reuse or is_known_by_weights(config, digest):
        known = {prediction.question_id: prediction for prediction in read_log(log, Prediction)}
    settings = describe_settings(config, task.sampling)
    unanswered = find_unanswered(questions, known, digest, settings)
    num_done = len(questions) - len(unanswered)
    on_progress(EvaluateProgress(task.name, num_done, len(questions)))
    for predictions in _stream(unanswered, task, config, model, digest):
        append_log(log, predictions)
        num_done += len(predictions)
        on_progress(EvaluateProgress(task.name, num_done, len(questions)))


def _stream(
    questions: Sequence[Question], task: Task, config: EvaluateConfig, model: str, digest: str
) -> Iterator[list[Prediction]]:
    """Yield batches of predictions in the order in which they finish."""
    if not questions:
        return
    import ray.data

    from llava_ray.data.start_ray import start_ray

    start_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    num_blocks = -(-len(questions) // config.concurrency)
    rows = [{"question": pickle.dumps(question)} for question in questions]
    answered = ray.data.from_items(rows, override_num_blocks=num_blocks).map_batches(
        Predictor,  # type: ignore[arg-type]  # a class is what Ray Data starts as an actor
        fn_constructor_args=(config, model, task.sampling, digest, SharedCrashCounter()),
        batch_size=config.concurrency,
        compute=ray.data.ActorPoolStrategy(
            size=config.num_actors,
            max_concurrent_calls_per_actor=BATCHES_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=config.num_cpus,
        num_gpus=choose_num_gpus(config.num_gpus, if_any=config.gpus_if_any),
    )
    for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
        predictions = [pickle.loads(each) for each in batch["prediction"]]
        for prediction in predictions:
            if isinstance(prediction, LlavaRayError):
                raise prediction
        yield predictions


def find_unanswered(
    questions: Sequence[Question], known: dict[str, Prediction], digest: str, settings: str
) -> list[Question]:
    """Return the questions without a prediction for this model, these images and settings."""

    def is_open(question: Question) -> bool:
        prediction = known.get(question.question_id)
        if prediction is None or prediction.status != "answered":
            return True
        try:
            shas = [hash_image(each) for each in question.images]
        except ImageError:
            return True
        return prediction.cache_key != make_cache_key(digest, question, shas, settings)

    return [question for question in questions if is_open(question)]


def read_questions(task: Task, config: TasksConfig) -> list[Question]:
    """Return the questions that a task asks.

    Raises:
        ConfigError: its files are missing or inconsistent.
    """
    questions = task.select(task.read_all(Path(config.data)))[: config.limit]
    if task.judge:
        task.judge.load_wording(config.judge_wording)  # fail early, not hours later
    return questions


def _score(
    task: Task,
    questions: Sequence[Question],
    config: EvaluateConfig,
    output: Path,
    on_progress: Callable[[EvaluateProgress], None],
) -> TaskResult:
    predictions = {p.question_id: p for p in read_log(_find_log(output, task), Prediction)}
    scores = score_predictions(task, questions, predictions)
    if task.judge:
        scores = grade_predictions(
            task.judge,
            questions,
            predictions,
            config,
            output / f"verdicts_{task.name}.jsonl",
            on_verdict=lambda done, of: on_progress(
                EvaluateProgress(f"{task.name}, judge", done, of)
            ),
        )
    write_task_samples(output, task, questions, predictions, scores)
    result = summarize_task(task, questions, predictions, scores, min_coverage=config.min_coverage)
    if task.submit is None:
        return result
    folder = task.find_folder(Path(config.data))
    path = output / f"submit_{task.name}"
    written, note = write_submission(task.submit, questions, predictions, folder, path)
    return replace(result, submission=written, note=note)


def _find_log(output: Path, task: Task) -> Path:
    return output / f"predictions_{task.name}.jsonl"


def _find_model(config: EvaluateConfig) -> str:
    """The name by which the model is asked."""
    if config.endpoint:
        return _choose_name(run_async(_list_names(config.endpoint)), config)
    return config.model_name or config.describe_model().name


async def _list_names(endpoint: str) -> list[str]:
    async with Client(endpoint) as client:
        return await client.list_models()


def _choose_name(names: Sequence[str], config: EvaluateConfig) -> str:
    if not names:
        raise ConfigError(f"the server at {config.endpoint} serves no model")
    if config.model_name and config.model_name not in names:
        raise ConfigError(
            f"the server at {config.endpoint} has no model {config.model_name!r}: it serves "
            f"{', '.join(names)}"
        )
    return config.model_name or names[0]


def _describe_reuse(config: EvaluateConfig) -> str:
    server = config.endpoint or config.app
    if config.reuse:
        return (
            f"{server} does not tell which weights it serves: logged predictions are kept because "
            "of reuse, though it may serve others now"
        )
    return (
        f"{server} does not tell which weights it serves: all questions are asked; --reuse keeps "
        "the predictions that an earlier run has logged"
    )


def _describe_run(config: EvaluateConfig, model: str, digest: str) -> dict[str, str]:
    about = {"model": config.endpoint or config.app or config.model, "name": model}
    about |= {"model_digest": digest}
    if config.limit:
        about |= {"limit": f"the first {config.limit} questions of each task"}
    if config.judge_endpoint:
        about |= {"judge": f"{config.judge_model} at {config.judge_endpoint}"}
    return about
