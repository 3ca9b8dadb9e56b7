"""A run on Ray Train: workers, their failures, where checkpoints go. Here alone is Ray, and in
`ray_metrics`.

launch -> TorchTrainer -> train_worker (on each worker) -> loop.train -> export
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from llava_ray.config import DataConfig, TrainConfig
from llava_ray.data import stream
from llava_ray.data.collate import Batch
from llava_ray.data.plan import Position
from llava_ray.data.pool import make_plan, open_pool
from llava_ray.errors import ConfigError, DivergedError, LlavaRayError, TrainingError
from llava_ray.train.checkpoint import read_progress
from llava_ray.train.dry_run import build_hollow, load_run_encoder
from llava_ray.train.finish import export_run, write_settings
from llava_ray.train.log import RunLog
from llava_ray.train.loop import Surroundings, train
from llava_ray.train.ray_metrics import RayMetrics
from llava_ray.train.storage import (
    is_address,
    is_begun,
    open_home,
    remove_unfinished,
    send_home,
)
from llava_ray.train.trackers import open_trackers
from llava_ray.train.weights import name_base


def launch(config: TrainConfig, *, resume: bool = False) -> str:
    """Train, and write the export; return the run's folder, a path or an address.

    Ray is started if none is running. A worker that dies takes the run back to its last checkpoint.

    Args:
        config: of the run.
        resume: go on with the run of that name from its last checkpoint.

    Raises:
        ConfigError: it cannot be begun.
        DivergedError: its loss is no number; checkpoints stay.
        TrainingError: it failed more often than `max_failures`; likewise.
    """
    config = write_paths_whole(config)
    folder = check_run(config, resume=resume)
    if not ray.is_initialized():
        ray.init(log_to_driver=True)
    with open_home(folder) as home:
        write_settings(home, config)
    best = fit(make_trainer(config), config)
    with open_home(folder) as home, best.as_directory() as checkpoint:
        export_run(Path(checkpoint), home, config)
    return folder


def make_trainer(config: TrainConfig) -> TorchTrainer:
    """Return Ray's trainer of a run; it goes on where there is a checkpoint."""
    is_gpu = _has_gpus() if config.use_gpu == "auto" else config.use_gpu
    return TorchTrainer(
        train_worker,
        train_loop_config=config.model_dump(),
        torch_config=TorchConfig(backend="nccl" if is_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=is_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, "GPU": int(is_gpu)},
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=config.output_dir,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.save_total_limit,
                checkpoint_score_attribute=config.metric_for_best_model,
                checkpoint_score_order="min",
            ),
        ),
    )


def fit(trainer: TorchTrainer, config: TrainConfig) -> Checkpoint:
    """Run a trainer to its end; return the best checkpoint, without a metric the last.

    Raises:
        DivergedError, TrainingError: as of `launch`.
    """
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise _explain(error, config) from error
    if result.return_value:
        raise DivergedError(result.return_value)
    if result.checkpoint is None:
        raise TrainingError("the run ended without a checkpoint: its data gives no step")
    metric = config.metric_for_best_model
    best = result.get_best_checkpoint(metric, "min") if metric else result.checkpoint
    assert best is not None
    return best


def check_run(config: TrainConfig, *, resume: bool = False) -> str:
    """Return a run's folder, once it is clear that the run can begin.

    Raises:
        ConfigError: data or model are not there or do not fit together, or the folder is another
            run's.
    """
    for dataset in (*config.data.datasets, *config.eval_datasets):
        open_pool([dataset])
    build_hollow(config)
    load_run_encoder(config)
    folder = f"{config.output_dir}/{config.name}"
    is_there = is_begun(folder)
    if is_there and not resume:
        raise ConfigError(
            f"there is a run named {config.name!r} in {config.output_dir!r} already: go on with it "
            "with --resume, or give name= another name"
        )
    if resume and not is_there:
        raise ConfigError(
            f"there is no run named {config.name!r} in {config.output_dir!r} to go on with: leave "
            "--resume away"
        )
    return folder


def write_paths_whole(config: TrainConfig) -> TrainConfig:
    """Return settings with whole paths: workers run in other folders than whoever starts them."""
    settings = config.model_dump()
    names = ("model", "base", "vision_tower", "pretrain_mm_mlp_adapter", "deepspeed")
    for name in names:
        settings[name] = settings[name] and str(name_base(settings[name]))
    for dataset in (*settings["data"]["datasets"], *settings["eval_datasets"]):
        dataset["path"] = str(name_base(dataset["path"]))
    if not is_address(config.output_dir):
        settings["output_dir"] = str(Path(config.output_dir).expanduser().resolve())
    settings["output_dir"] = settings["output_dir"].rstrip("/")
    return TrainConfig(**settings)


def train_worker(settings: dict[str, Any]) -> str | None:
    """Train on one worker of Ray Train's.

    Args:
        settings: of `TrainConfig`.

    Returns:
        Why the run is over before its end, where Ray's trying again would end the same way.
    """
    config = TrainConfig(**settings)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    folder = f"{config.output_dir}/{config.name}"
    opened = open_home(folder) if rank == 0 else contextlib.nullcontext()
    with opened as home, _open_checkpoint() as checkpoint:
        log = RunLog(
            home,
            trackers=[*open_trackers(config, home), RayMetrics(config.name)],
            send=lambda: send_home(home, folder) if home else None,
            every=config.logging_steps,
        )
        if home:
            remove_unfinished(folder, read_progress(checkpoint).step if checkpoint else 0)
        try:
            train(config, describe_surroundings(config), log, resume=checkpoint)
        except DivergedError as error:
            return error.message
    return None


def describe_surroundings(config: TrainConfig) -> Surroundings:
    """Return what Ray gives to the loop of this worker."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    model = stream.Checkpoint(config.model, config.base, config.vision_tower, config.template)
    accumulation = config.count_accumulation(num_workers)
    plan = make_plan(config.data, open_pool(config.data.datasets))
    num_steps = plan.num_batches * config.num_train_epochs

    def read_batches(position: Position | None) -> Iterator[Batch]:
        worker = stream.Worker(rank, num_workers, accumulation)
        return stream.stream_batches(
            config.data,
            model,
            worker=worker,
            start=position,
            num_epochs=config.num_train_epochs,
        )

    def read_eval_batches(size: int) -> Iterator[Batch]:
        data = config.data.model_dump() | {
            "datasets": config.eval_datasets,
            "batch_size": num_workers * size,
            "grouping": "none",
            "num_readers": 0,
        }
        worker = stream.Worker(rank, num_workers, 1)
        return stream.stream_batches(DataConfig(**data), model, worker=worker)

    return Surroundings(
        read_batches=read_batches,
        read_eval_batches=read_eval_batches if config.eval_datasets else None,
        num_steps=min(num_steps, config.max_steps or num_steps),
        new_folder=lambda: Path(tempfile.mkdtemp(prefix="llava-ray-checkpoint-")),
        keep=_keep,
        is_leaving=lambda: ray.train.get_preemption_info() is not None,
    )


def _keep(folder: Path, metrics: dict[str, float]) -> None:
    """Move a checkpoint to the run's storage, together with the other workers' parts."""
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"checkpoint-{int(metrics['step'])}",
        delete_local_checkpoint_after_upload=True,
    )


@contextlib.contextmanager
def _open_checkpoint() -> Iterator[Path | None]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _has_gpus() -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0


def _explain(error: TrainingFailedError, config: TrainConfig) -> LlavaRayError:
    """Return what a worker raised on purpose, or what is known of its end."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "_base_exc", failure)  # Ray wraps what a worker raises
        if isinstance(cause, LlavaRayError):
            return cause
    return TrainingError(
        f"training failed ({error}): the checkpoints in {config.output_dir}/{config.name} are "
        "intact, and --resume goes on from the last"
    )
