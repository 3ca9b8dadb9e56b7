"""Benchmarks of a run's checkpoints, while its training goes on: what `train.launch` is given.

prepare_benchmarks -> launch -> evaluate_checkpoint (a task of Ray's each) -> run.evaluate
"""

from llava_ray.config import EvaluateConfig, TrainConfig
from llava_ray.evaluate.results.results import TaskResult
from llava_ray.evaluate.run import evaluate, read_questions
from llava_ray.evaluate.tasks import find_tasks
from llava_ray.train.checkpoint import MODEL
from llava_ray.train.launch import EvaluateCheckpoint
from llava_ray.train.log import print_line
from llava_ray.train.run_folder import open_run_folder

EVALUATIONS = "evaluations"


def prepare_benchmarks(config: TrainConfig) -> EvaluateCheckpoint | None:
    """Return what measures a run's checkpoints; None if it has no benchmarks.

    Raises:
        ConfigError: no such task, or its files are not there.
    """
    count_questions(config)
    return evaluate_checkpoint if config.benchmarks else None


def count_questions(config: TrainConfig) -> dict[str, int]:
    """Return how many questions each task of a run's benchmarks asks.

    Raises:
        ConfigError: no such task, or its files are not there.
    """
    if config.benchmarks is None:
        return {}
    return {
        task.name: len(read_questions(task, config.benchmarks))
        for task in find_tasks(config.benchmarks.tasks)
    }


def evaluate_checkpoint(config: TrainConfig, checkpoint: str) -> dict[str, float]:
    """Return the value of each task that has one; the results go into the run's `evaluations/`.

    Args:
        config: of the run.
        checkpoint: path or address of one of its checkpoints.

    Raises:
        ConfigError: as of `run.evaluate`.
    """
    assert config.benchmarks is not None
    run, _, name = checkpoint.rpartition("/")
    with open_run_folder(f"{run}/{EVALUATIONS}/{name}") as output:
        settings = config.benchmarks.model_dump(exclude={"steps"})
        results = evaluate(
            EvaluateConfig(**settings, model=f"{checkpoint}/{MODEL}", output=str(output))
        )
    print_line(f"{name}  " + "  ".join(map(_describe, results)))
    return {result.task: found[1].value for result in results if (found := result.headline)}


def _describe(result: TaskResult) -> str:
    if result.headline is None:
        return f"{result.task}: no number, {result.coverage:.0%} were scored"
    name, number = result.headline
    error = "" if number.standard_error is None else f" ± {number.standard_error:.2f}"
    return f"{result.task} {name} {number.value:.2f}{error}"
