"""One worker of a run on Ray Train: gives the loop its data, and Ray the loop's checkpoints.

launch -> train_worker -> loop.train
"""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint

from llava_ray.config import DataConfig, TrainConfig
from llava_ray.data.loader.collate import Batch
from llava_ray.data.loader.dataset import make_order, open_datasets
from llava_ray.data.loader.order import Position
from llava_ray.data.loader.stream import EncoderSpec, WorkerRank, stream_batches
from llava_ray.errors import DivergedError
from llava_ray.model.devices import computes_on_gpu
from llava_ray.train.best import UNKNOWN
from llava_ray.train.checkpoint import read_progress
from llava_ray.train.log import RunLog
from llava_ray.train.loop import LoopContext, train
from llava_ray.train.run_folder import open_run_folder, remove_unfinished, upload_run_folder
from llava_ray.train.trackers import RayMetrics, open_trackers


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
    if not computes_on_gpu():
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    folder = f"{config.output_dir}/{config.name}"
    opened = open_run_folder(folder) if rank == 0 else contextlib.nullcontext()
    with opened as home, _open_checkpoint() as checkpoint:
        log = RunLog(
            home,
            trackers=[*open_trackers(config, home), RayMetrics(config.name)],
            send=lambda: upload_run_folder(home, folder) if home else None,
            every=config.logging_steps,
        )
        if home:
            remove_unfinished(folder, read_progress(checkpoint).step if checkpoint else 0)
        try:
            train(config, make_loop_context(config), log, resume=checkpoint)
        except DivergedError as error:
            return error.message
        finally:
            log.close()
    return None


def make_loop_context(config: TrainConfig) -> LoopContext:
    """Return what Ray gives to the loop of this worker."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    encoder_spec = EncoderSpec(config.model, config.base, config.vision_tower, config.template)
    accumulation = config.count_accumulation(num_workers)
    order = make_order(config.data, open_datasets(config.data.datasets))
    num_steps = order.num_batches * config.num_train_epochs
    num_steps = min(num_steps, config.max_steps or num_steps)

    def read_batches(position: Position | None) -> Iterator[Batch]:
        worker = WorkerRank(rank, num_workers, accumulation)
        return stream_batches(
            config.data,
            encoder_spec,
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
        worker = WorkerRank(rank, num_workers, 1)
        return stream_batches(DataConfig(**data), encoder_spec, worker=worker)

    return LoopContext(
        read_batches=read_batches,
        read_eval_batches=read_eval_batches if config.eval_datasets else None,
        num_steps=num_steps,
        new_folder=lambda: Path(tempfile.mkdtemp(prefix="llava-ray-checkpoint-")),
        keep=functools.partial(_keep, config, num_steps),
        is_leaving=lambda: ray.train.get_preemption_info() is not None,
    )


def _keep(config: TrainConfig, num_steps: int, folder: Path, metrics: dict[str, float]) -> None:
    """Move a checkpoint to the run's storage, together with the other workers' parts."""
    step, is_due = int(metrics["step"]), False
    if benchmarks := config.benchmarks:
        is_due = step == num_steps or step % (benchmarks.steps or 1) == 0
        metrics = metrics | dict.fromkeys(benchmarks.tasks, UNKNOWN)
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"checkpoint-{step}",
        delete_local_checkpoint_after_upload=True,
        validation=is_due,
    )


@contextlib.contextmanager
def _open_checkpoint() -> Iterator[Path | None]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)
