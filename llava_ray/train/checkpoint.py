"""A checkpoint of a run: everything that going on needs, and a model that loads by itself.

    progress.json   where the run stands; written last, so a folder without it is none
    state/          DeepSpeed's: trained weights in float32, the optimizer's state
    model/          what `load_model`, `export` and `serve` take (see `weights`)

Dropout and data order follow from seed and step, so no generator's state needs to be kept.
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
from llava_ray.train.deepspeed_engine import TrainState, import_deepspeed
from llava_ray.train.save_weights import write_weights

PROGRESS = "progress.json"
STATE = "state"
MODEL = "model"
_TAG = "all"


class TrainProgress(BaseModel):
    """Where a run stands.

    Attributes:
        step: steps that were taken.
        position: of the data, before the next step.
        num_workers: that the state is divided among.
        stage: of ZeRO.
        method: of the run; another has other weights.
        loss: of the last step.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    position: Position
    num_workers: int
    stage: int
    method: str
    loss: float


def save_checkpoint(
    folder: Path,
    state: TrainState,
    config: TrainConfig,
    *,
    step: int,
    position: Position,
    loss: float,
) -> None:
    """Write this worker's part of a checkpoint; all workers do so together.

    Args:
        folder: an empty one; the same or another for each worker.
        state: what is saved.
        config: of the run.
        step: steps that were taken.
        position: of the data, before the next step.
        loss: of the last step.
    """
    state.engine.save_checkpoint(
        str(folder / STATE), tag=_TAG, exclude_frozen_parameters=True, client_state={}
    )
    write_weights(folder / MODEL, state, config)
    progress = TrainProgress(
        step=step,
        position=position,
        num_workers=dist.get_world_size(),
        stage=state.stage,
        method=config.method,
        loss=loss,
    )
    if dist.get_rank() == 0:
        (folder / PROGRESS).write_text(progress.model_dump_json(indent=2) + "\n")


def read_progress(folder: Path) -> TrainProgress:
    """Return where the run stood that wrote a checkpoint.

    Raises:
        ConfigError: it is none.
    """
    try:
        return TrainProgress.model_validate_json((folder / PROGRESS).read_text())
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{str(folder)!r} is no whole checkpoint ({PROGRESS}: {error}): give one that training "
            "wrote"
        ) from error


def is_same_partition(progress: TrainProgress, stage: int) -> bool:
    """Whether a checkpoint's state can be read as it lies, by as many workers as there are now."""
    return (progress.num_workers, progress.stage) == (dist.get_world_size(), stage)


@contextlib.contextmanager
def open_state(folder: Path, *, is_alike: bool) -> Iterator[Path]:
    """Give the folder of a checkpoint's state, taken apart for another number of workers.

    DeepSpeed's universal checkpoints hold each weight by itself. The workers of a machine share
    one, which is gone when the block ends.

    Args:
        folder: of the checkpoint.
        is_alike: see `is_same_partition`.
    """
    if is_alike:
        yield folder / STATE
        return
    import_deepspeed(is_gpu=torch.cuda.is_available())
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
    """Put a checkpoint's state into a state; the rates stay those of the run's settings."""
    groups = state.engine.optimizer.param_groups
    rates = [(group["max_lr"], group["weight_decay"]) for group in groups]
    loaded, _ = state.engine.load_checkpoint(str(state_folder), tag=_TAG, load_module_strict=False)
    if loaded is None:
        raise ConfigError(
            f"the state in {str(state_folder)!r} does not load: an earlier checkpoint may"
        )
    for group, (rate, decay) in zip(state.engine.optimizer.param_groups, rates, strict=True):
        group["max_lr"], group["weight_decay"] = rate, decay
    # DeepSpeed gives ZeRO 3's groups one counter of steps, which AdamW then counts up for each.
    base = getattr(state.engine.optimizer, "optimizer", state.engine.optimizer)
    for kept in base.state.values():
        if torch.is_tensor(kept.get("step")):
            kept["step"] = kept["step"].clone()
