"""Save and restore a run's checkpoints: the state to resume from, and a model that can be loaded.

    progress.json   where the run stands; written last, so a folder without it is incomplete
    state/          DeepSpeed's state: trained weights in float32 and the optimizer's state
    model/          what `load_model`, `export` and `serve` take (see `save_weights`)

Dropout and data order follow from the seed and the step, so no random generator's state is saved.
"""

import contextlib
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError

from llava_ray.config import TrainConfig
from llava_ray.data.loader.order import Position
from llava_ray.errors import ConfigError
from llava_ray.model.devices import computes_on_gpu
from llava_ray.train.deepspeed_engine import TrainState, import_deepspeed
from llava_ray.train.save_weights import write_weights

PROGRESS = "progress.json"
STATE = "state"
MODEL = "model"
_TAG = "all"


class TrainProgress(BaseModel):
    """Where a run stands.

    Attributes:
        step: Number of steps taken.
        position: Position in the data before the next step.
        num_workers: Number of workers among which the state is partitioned.
        stage: ZeRO stage.
        method: The run's training method; it determines which weights are saved.
        loss: Loss of the last step; None if nothing was learned in it.
        files: Size in bytes of every other file of the checkpoint, to tell whether it is whole.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    position: Position
    num_workers: int
    stage: int
    method: str
    loss: float | None
    files: dict[str, int] = {}


def save_checkpoint(
    folder: Path,
    state: TrainState,
    config: TrainConfig,
    *,
    step: int,
    position: Position,
    loss: float | None,
) -> None:
    """Write this worker's part of a checkpoint; all workers must call this together.

    Args:
        folder: An empty folder; workers may share one or have one each.
        state: The state to save.
        config: Settings of the run.
        step: Number of steps taken.
        position: Position in the data before the next step.
        loss: Loss of the last step.
    """
    state.engine.save_checkpoint(
        str(folder / STATE), tag=_TAG, exclude_frozen_parameters=True, client_state={}
    )
    write_weights(folder / MODEL, state, config)
    sizes: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(sizes, _measure_files(folder))
    progress = TrainProgress(
        step=step,
        position=position,
        num_workers=dist.get_world_size(),
        stage=state.stage,
        method=config.method,
        loss=loss,
        files={name: size for each in sizes for name, size in each.items()},
    )
    if dist.get_rank() == 0:
        (folder / PROGRESS).write_text(progress.model_dump_json(indent=2) + "\n")


def _measure_files(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def read_progress(folder: Path) -> TrainProgress:
    """Read how far the run was when it wrote a checkpoint.

    Raises:
        ConfigError: The folder is not a complete checkpoint.
    """
    try:
        return TrainProgress.model_validate_json((folder / PROGRESS).read_text())
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{str(folder)!r} is not a complete training checkpoint ({PROGRESS}: {error}): give "
            "a checkpoint-<step> folder of a run"
        ) from error


def is_same_partition(progress: TrainProgress, stage: int) -> bool:
    """Whether the checkpoint has the current worker count and ZeRO stage, so loads directly."""
    return (progress.num_workers, progress.stage) == (dist.get_world_size(), stage)


@contextlib.contextmanager
def open_state(folder: Path, *, is_alike: bool) -> Iterator[Path]:
    """Yield the folder of a checkpoint's state, converted if the partition has changed.

    The conversion is to DeepSpeed's universal format, which stores each weight separately. The
    workers of a machine share one converted copy, which is deleted when the block ends.

    Args:
        folder: The checkpoint.
        is_alike: The result of `is_same_partition`.
    """
    if is_alike:
        yield folder / STATE
        return
    import_deepspeed(is_gpu=computes_on_gpu())
    from deepspeed.checkpoint.ds_to_universal import main as take_apart

    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    with tempfile.TemporaryDirectory() as scratch:
        if is_first:
            take_apart(
                Namespace(
                    input_folder=str(folder / STATE / _TAG),
                    output_folder=f"{scratch}/{_TAG}",
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
        places: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
        host = os.uname().nodename
        dist.all_gather_object(places, (host, scratch if is_first else ""))
        yield Path(next(place for name, place in places if name == host and place))
        dist.barrier()


def restore_state(state_folder: Path, state: TrainState) -> None:
    """Load a checkpoint's state; learning rates and weight decay stay as in the run's settings."""
    groups = state.engine.optimizer.param_groups
    rates = [(group["max_lr"], group["weight_decay"]) for group in groups]
    loaded, _ = state.engine.load_checkpoint(str(state_folder), tag=_TAG, load_module_strict=False)
    if loaded is None:
        raise ConfigError(
            f"DeepSpeed cannot load the state in {str(state_folder)!r}: remove this checkpoint to "
            "resume from an earlier one"
        )
    for group, (rate, decay) in zip(state.engine.optimizer.param_groups, rates, strict=True):
        group["max_lr"], group["weight_decay"] = rate, decay
    # With ZeRO 3, DeepSpeed shares one step counter among groups; AdamW would count it up for each.
    base = getattr(state.engine.optimizer, "optimizer", state.engine.optimizer)
    for kept in base.state.values():
        if torch.is_tensor(kept.get("step")):
            kept["step"] = kept["step"].clone()
