"""One worker of a run on Ray Train: gives the loop its data, and Ray the loop's checkpoints.

launch -> train_worker -> loop.train
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import torch
from ray.train import Checkpoint

from llava_ray.config import DataConfig, TrainConfig
from llava_ray.data.loader.collate import Batch
from llava_ray.data.loader.dataset import make_order, open_datasets
from llava_ray.data.loader.order import Position
from llava_ray.data.loader.stream import EncoderSpec, WorkerRank, stream_batches
from llava_ray.errors import DivergedError, LlavaRayError, StoppedError
from llava_ray.model.devices import computes_on_gpu
from llava_ray.train.best import UNKNOWN
from llava_ray.train.checkpoint import read_progress
from llava_ray.train.find_checkpoint import find_whole_steps, remove_unfinished
from llava_ray.train.log import RunLog
from llava_ray.train.loop import LoopContext, train
from llava_ray.train.run_folder import open_run_folder, upload_run_folder
from llava_ray.train.stop import is_stop_requested
from llava_ray.train.trackers import RayMetrics, open_trackers


def train_worker(settings: dict[str, Any]) -> LlavaRayError | None:
    """Train on one worker of Ray Train's.

    Args:
        settings: of `TrainConfig`.

    Returns:
        The error that ended the run, where Ray shall not try again.
    """
    config = TrainConfig(**settings)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if not computes_on_gpu():
        torch.set_num_threads(choose_num_threads(config, context.get_local_world_size()))
    folder = f"{config.output_dir}/{config.name}"
    opened = open_run_folder(folder) if rank == 0 else contextlib.nullcontext()
    with opened as home, _open_newest(folder, rank) as checkpoint:
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
        except (DivergedError, StoppedError) as error:
            return error
        finally:
            log.close()
    return None


def choose_num_threads(config: TrainConfig, num_local: int) -> int:
    """Return the threads with which a worker without a GPU computes.

    Args:
        config: Settings of the run.
        num_local: Workers on this machine.
    """
    if config.cpus_per_worker is None and num_local == 1:
        return len(os.sched_getaffinity(0))
    return max(1, int(config.reserved_cpus))


def make_loop_context(config: TrainConfig) -> LoopContext:
    """Return what Ray gives to the loop of this worker."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    folder = f"{config.output_dir}/{config.name}"
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
        is_stopping=lambda: rank == 0 and is_stop_requested(folder),
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
def _open_newest(folder: str, rank: int) -> Iterator[Path | None]:
    """Yield a copy of the newest whole checkpoint, the same for all workers; None if there is none.

    It is looked for in the run's folder: what Ray knows may be one checkpoint behind.
    """
    steps = find_whole_steps(folder) if rank == 0 else []
    step = ray.train.collective.broadcast_from_rank_zero(steps[-1] if steps else None)
    if step is None:
        yield None
        return
    with Checkpoint(f"{folder}/checkpoint-{step}").as_directory() as checkpoint:
        yield Path(checkpoint)
