"""Open a run's checkpoint, model and encoder without weights, to check a run before it starts.

Used by `launch` and `dry_run`, in the process of the command."""

from importlib.util import find_spec
from typing import Any

import torch

from llava_ray.config import TrainConfig
from llava_ray.data.loader.encode import Encoder, make_encoder
from llava_ray.errors import MissingPackageError
from llava_ray.model.open_checkpoint import OpenedCheckpoint, open_checkpoint
from llava_ray.train.deepspeed_engine import load_projector
from llava_ray.train.param_groups import select_trainable


def open_run(config: TrainConfig) -> OpenedCheckpoint:
    """Open the checkpoint that a run starts from; no weights are read.

    Raises:
        ConfigError: There is no such checkpoint or no template of that name.
    """
    return open_checkpoint(
        config.model,
        base=config.base,
        vision_tower=config.vision_tower,
        template=config.template,
    )


def build_meta_model(config: TrainConfig, opened: OpenedCheckpoint) -> Any:
    """Build the run's model on the meta device, with its trainable parameters selected.

    Raises:
        ConfigError: The checkpoint is inconsistent, the projector to start from does not fit, or
            nothing would be trained.
    """
    architecture = opened.architecture
    with torch.device("meta"):
        model = architecture.model_class(architecture.config)
        if config.pretrain_mm_mlp_adapter:
            load_projector(model, config.pretrain_mm_mlp_adapter)
        select_trainable(model, config)
    return model


def load_run_encoder(config: TrainConfig, opened: OpenedCheckpoint) -> Encoder:
    """Return the encoder of a run's samples.

    Raises:
        ConfigError: The template is unknown or does not fit the model.
    """
    return make_encoder(
        opened,
        max_length=config.data.max_length,
        truncates=config.data.over_long == "truncate",
    )


def check_packages(config: TrainConfig) -> None:
    """Check that the packages that a run's settings need are installed.

    Raises:
        MissingPackageError: One is not.
    """
    needed = {
        "deepspeed": ("training", "llava-ray[train]", True),
        "peft": ("method=lora", "llava-ray[train]", config.method == "lora"),
        "bitsandbytes": ("quantization", "bitsandbytes", config.quantization is not None),
        "liger_kernel": ("use_liger_kernel", "liger-kernel", config.use_liger_kernel),
        "tensorboard": ("report_to", "llava-ray[track]", "tensorboard" in config.report_to),
        "wandb": ("report_to", "llava-ray[track]", "wandb" in config.report_to),
        "mlflow": ("report_to", "llava-ray[track]", "mlflow" in config.report_to),
    }
    for package, (what, install, is_needed) in needed.items():
        if is_needed and find_spec(package) is None:
            raise MissingPackageError(
                f"{what} needs the package {package}: pip install '{install}'"
            )
