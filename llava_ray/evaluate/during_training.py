"""Evaluates the checkpoints of a training run on benchmarks while it goes on.

train_model: prepare_benchmarks -> launch -> evaluate_checkpoint (a Ray task for each checkpoint)
-> run.evaluate_model
"""

from llava_ray.config import EvaluateConfig, TrainConfig
from llava_ray.evaluate.results.results import TaskResult
from llava_ray.evaluate.run import evaluate_model, read_questions
from llava_ray.evaluate.tasks import find_tasks
from llava_ray.train.checkpoint import MODEL
from llava_ray.train.launch import EvaluateCheckpoint, launch
from llava_ray.train.log import print_line
from llava_ray.train.run_folder import open_run_folder

EVALUATIONS = "evaluations"


def train_model(config: TrainConfig, *, resume: bool | str = False) -> str:
    """Train a model as `llava-ray train` does; return the run's folder, a path or an address.

    Its trained model is in `export` there. Ray is started if none is running.

    Args:
        config: of the run; its `benchmarks` measure checkpoints while training goes on.
        resume: continue the run of that name from its newest whole checkpoint, or the one named.

    Raises:
        ConfigError: the run cannot be started.
        TrainingError: it failed more often than `max_failures`; its checkpoints stay.
    """
    measure = prepare_benchmarks(config)
    return launch(config, resume=resume, evaluate_checkpoint=measure)


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
        ConfigError: as of `run.evaluate_model`.
    """
    assert config.benchmarks is not None
    run, _, name = checkpoint.rpartition("/")
    with open_run_folder(f"{run}/{EVALUATIONS}/{name}") as output:
        settings = config.benchmarks.model_dump(exclude={"steps"})
        results = evaluate_model(
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
