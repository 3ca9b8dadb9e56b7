"""Start a training run on Ray Train, and export its model at the end.

launch -> TorchTrainer -> worker.train_worker (on each worker) -> loop.train -> export
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.validation_config import ValidationConfig

from llava_ray.cluster import count_gpus, count_resource
from llava_ray.config import DataConfig, TrainConfig
from llava_ray.data.loader.dataset import make_order, open_datasets
from llava_ray.errors import ConfigError, LlavaRayError, TrainingError
from llava_ray.model.open_checkpoint import OpenedCheckpoint
from llava_ray.storage import is_address
from llava_ray.train.best import choose_best, find_order
from llava_ray.train.find_checkpoint import (
    describe_kept,
    find_whole_steps,
    is_started,
    prepare_resume,
    prepare_start,
)
from llava_ray.train.log import print_line
from llava_ray.train.preflight import build_meta_model, load_run_encoder, open_run
from llava_ray.train.run_folder import export_run, open_run_folder, write_settings
from llava_ray.train.save_weights import name_base
from llava_ray.train.stop import run_stoppable
from llava_ray.train.survey import SampleSurvey, survey_samples
from llava_ray.train.worker import train_worker

EvaluateCheckpoint = Callable[[TrainConfig, str], dict[str, float]]
"""Evaluates a checkpoint, given its path or address; returns a value per task."""

_JOB_COPY = "/runtime_resources/working_dir_files/"
"""In the path of the copies that Ray makes of a job's working directory."""

_LOOK_AGAIN_S = 20
"""Seconds to wait for workers to start before Ray Train checks again for lost machines."""


def launch(
    config: TrainConfig,
    *,
    resume: bool | str = False,
    evaluate_checkpoint: EvaluateCheckpoint | None = None,
) -> str:
    """Train, export the model, and return the run's folder (a path or an address).

    Starts Ray if none is running. If a worker dies, the run resumes from its last checkpoint.

    Args:
        config: Settings of the run.
        resume: Continue the run of that name from its newest whole checkpoint, or from the one
            named ("checkpoint-500").
        evaluate_checkpoint: Evaluates checkpoints on `benchmarks`, as
            `llava_ray.evaluate.during_training.prepare_benchmarks` returns it.

    Raises:
        ConfigError: The run cannot start.
        DivergedError: The loss is NaN or infinite; checkpoints are kept.
        StoppedError: Ctrl-C or SIGTERM ended it after a checkpoint.
        TrainingError: It failed more than `max_failures` times; checkpoints are kept.
    """
    config = resolve_paths(config)
    if config.benchmarks and not evaluate_checkpoint:
        raise ConfigError(
            "the settings have benchmarks, but no function to run them was given: call "
            "launch(evaluate_checkpoint=prepare_benchmarks(config)), from "
            "llava_ray.evaluate.during_training"
        )
    opened = open_run(config)
    begun_with = opened.checkpoint
    folder = check_run(config, opened, resume=bool(resume))
    for line in survey_run(config, opened).describe():
        print_line(line)
    del opened
    if resume:
        step = prepare_resume(folder, None if resume is True else str(resume))
        print_line(f"resuming from checkpoint-{step}")
    else:
        prepare_start(folder)
    if not ray.is_initialized():
        ray.init(log_to_driver=True)
    check_cpus(config, count_resource("CPU"))
    with open_run_folder(folder) as home:
        write_settings(home, config)
    best = fit(make_trainer(config, evaluate_checkpoint), config)
    with open_run_folder(folder) as home, best.as_directory() as checkpoint:
        export_run(Path(checkpoint), home, config, begun_with=begun_with)
    return folder


def make_trainer(
    config: TrainConfig, evaluate_checkpoint: EvaluateCheckpoint | None = None
) -> TorchTrainer:
    """Return Ray's trainer for a run; it resumes if the run has a checkpoint."""
    validation = evaluate_checkpoint and ValidationConfig(
        functools.partial(_evaluate, config, evaluate_checkpoint),
        ray_remote_kwargs={"num_cpus": 0},  # its actors request what `benchmarks` sets
    )
    is_gpu = count_gpus() > 0 if config.use_gpu == "auto" else config.use_gpu
    least = config.min_workers
    if least:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{_LOOK_AGAIN_S}")
    return TorchTrainer(
        train_worker,
        train_loop_config=config.model_dump(),
        torch_config=TorchConfig(backend="nccl" if is_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(least, config.num_workers) if least else config.num_workers,
            elastic_resize_monitor_interval_s=config.grow_every_s,
            use_gpu=is_gpu,
            resources_per_worker={"CPU": config.reserved_cpus, "GPU": int(is_gpu)},
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=config.output_dir,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.save_total_limit,
                checkpoint_score_attribute=config.metric_for_best_model,
                checkpoint_score_order=find_order(config.metric_for_best_model),
            ),
        ),
        validation_config=validation,
    )


def fit(trainer: TorchTrainer, config: TrainConfig) -> Checkpoint:
    """Run a trainer to its end; return the best checkpoint, or the last if there is no metric.

    Raises:
        DivergedError, StoppedError, TrainingError: As in `launch`.
    """
    folder = f"{config.output_dir}/{config.name}"
    try:
        result = run_stoppable(trainer.fit, folder)
    except TrainingFailedError as error:
        raise _explain(error, config) from error
    if ended := result.return_value:
        raise type(ended)(f"{ended.message}; {describe_kept(folder)}")
    last = result.checkpoint
    if last is None:  # Ray does not know of the checkpoint that this run resumed from
        steps = find_whole_steps(folder)
        if not steps:
            raise TrainingError(
                "the run ended without a checkpoint: its data is too small for a single step"
            )
        last = Checkpoint(f"{folder}/checkpoint-{steps[-1]}")
    metric = config.metric_for_best_model
    if metric is None:
        return last
    best = choose_best(result.best_checkpoints or [], metric)
    if best is None:
        print_line(f"no checkpoint has a value for {metric}: exporting the last one")
    return best or last


def check_run(config: TrainConfig, opened: OpenedCheckpoint, *, resume: bool = False) -> str:
    """Check that a run can start, and return its folder.

    Raises:
        ConfigError: The data or the model is missing, they do not fit together, or the folder
            belongs to another run.
    """
    for dataset in (*config.data.datasets, *config.eval_datasets):
        open_datasets([dataset])
    build_meta_model(config, opened)
    load_run_encoder(config, opened)
    folder = f"{config.output_dir}/{config.name}"
    is_there = is_started(folder)
    if is_there and not resume:
        raise ConfigError(
            f"a run named {config.name!r} already exists in {config.output_dir!r}: continue it "
            "with --resume, or choose another name="
        )
    if resume and not is_there:
        raise ConfigError(
            f"there is no run named {config.name!r} in {config.output_dir!r} to resume: start it "
            "without --resume"
        )
    return folder


def survey_run(config: TrainConfig, opened: OpenedCheckpoint) -> SampleSurvey:
    """Try the samples of a run, held-out ones too; return what became of the training samples.

    Raises:
        ConfigError: Data cannot be read, or none of it can be used.
    """
    encoder = load_run_encoder(config, opened)
    if config.eval_datasets:
        settings = config.data.model_dump() | {"datasets": config.eval_datasets, "grouping": "none"}
        held_out = DataConfig(**settings)
        datasets = open_datasets(held_out.datasets)
        survey_samples(held_out, datasets, make_order(held_out, datasets), encoder)
    datasets = open_datasets(config.data.datasets)
    return survey_samples(config.data, datasets, make_order(config.data, datasets), encoder)


def check_cpus(config: TrainConfig, num_cpus: float) -> None:
    """Check that workers and their readers have CPUs; otherwise they would wait without end.

    Args:
        config: Settings of the run.
        num_cpus: The CPUs that the cluster has or can start.

    Raises:
        ConfigError: They need more.
    """
    workers = config.min_workers or config.num_workers
    readers = config.data.num_readers * config.data.reader_cpus
    needed = workers * (config.reserved_cpus + readers)
    if needed > num_cpus:
        raise ConfigError(
            f"{workers} workers need {needed:g} CPUs ({config.reserved_cpus:g} each, and "
            f"{readers:g} for its {config.data.num_readers} readers), and the cluster has or can "
            f"start {num_cpus:g}: lower data.num_readers, data.reader_cpus or cpus_per_worker"
        )


def resolve_paths(config: TrainConfig) -> TrainConfig:
    """Return the settings with absolute paths, as workers have another working directory.

    Raises:
        ConfigError: The run's folder would be in a job's copy of its working directory.
    """
    place = Path(config.output_dir).expanduser()
    if not is_address(config.output_dir) and _JOB_COPY in str(place.resolve()):
        raise ConfigError(
            f"output_dir={config.output_dir!r} is relative to this job's working directory, a copy "
            "that Ray removes: give an absolute path that all machines see, or an address such as "
            "s3://..."
        )
    settings = config.model_dump()
    names = ("model", "base", "vision_tower", "pretrain_mm_mlp_adapter", "deepspeed")
    for name in names:
        settings[name] = settings[name] and str(name_base(settings[name]))
    for dataset in (*settings["data"]["datasets"], *settings["eval_datasets"]):
        dataset["path"] = str(name_base(dataset["path"]))
    for name in ("data", "judge_wording"):
        if settings["benchmarks"] and settings["benchmarks"][name]:
            settings["benchmarks"][name] = str(name_base(settings["benchmarks"][name]))
    if not is_address(config.output_dir):
        settings["output_dir"] = str(Path(config.output_dir).expanduser().resolve())
    settings["output_dir"] = settings["output_dir"].rstrip("/")
    return TrainConfig(**settings)


def _evaluate(
    config: TrainConfig,
    evaluate_checkpoint: EvaluateCheckpoint,
    checkpoint: Checkpoint,
    **_: Any,  # further arguments that Ray may pass
) -> dict[str, float]:
    """Evaluate a checkpoint in a Ray task; if that fails, the run continues without its values."""
    address = f"{config.output_dir}/{config.name}/{Path(checkpoint.path).name}"
    try:
        return evaluate_checkpoint(config, address)
    except LlavaRayError as error:
        print_line(f"{Path(address).name} could not be evaluated: {error.message}")
        return {}


def _explain(error: TrainingFailedError, config: TrainConfig) -> LlavaRayError:
    """Return the LlavaRayError that a worker raised, or else a TrainingError with Ray's message."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "_base_exc", failure)  # Ray wraps what a worker raises
        if isinstance(cause, LlavaRayError):
            return cause
    return TrainingError(
        f"training failed ({error}); {describe_kept(f'{config.output_dir}/{config.name}')}"
    )
