"""Open a run's checkpoint, model and encoder without weights, to check a run before it starts.

Used by `launch` and `dry_run`, in the process of the command."""

import importlib.util
from typing import Any

import torch

from llava_ray.config import TrainConfig
from llava_ray.data.loader.encode import Encoder, make_encoder
from llava_ray.errors import MissingPackageError
from llava_ray.model.open_checkpoint import OpenedCheckpoint, open_checkpoint
from llava_ray.train.param_groups import select_trainable

_INSTALL = {
    "flash_attn": "pip install flash-attn --no-build-isolation on all machines, or set "
    "attention=auto",
    "bitsandbytes": "pip install 'llava-ray[quant]' on all machines",
    "liger_kernel": "pip install liger-kernel on all machines",
    "deepspeed": "pip install 'llava-ray[train]'",
}


def open_run(config: TrainConfig) -> OpenedCheckpoint:
    """Open the checkpoint that a run starts from; no weights are read.

    Raises:
        ConfigError: There is no such checkpoint or no template of that name.
        MissingPackageError: A package that the settings need is not installed.
    """
    check_packages(config)
    return open_checkpoint(
        config.model,
        base=config.base,
        vision_tower=config.vision_tower,
        template=config.template,
    )


def check_packages(config: TrainConfig) -> None:
    """Check that the packages which a run's settings need are installed here, as on its workers.

    Raises:
        MissingPackageError: One is not.
    """
    needs = {
        "flash_attn": config.attention == "flash_attention_2" and "attention=flash_attention_2",
        "bitsandbytes": config.quantization and f"quantization={config.quantization}",
        "liger_kernel": config.use_liger_kernel and "use_liger_kernel",
        "deepspeed": "training",
    }
    for package, setting in needs.items():
        if setting and not importlib.util.find_spec(package):
            raise MissingPackageError(
                f"{setting} needs a package that is not installed: {_INSTALL[package]}"
            )


def build_meta_model(config: TrainConfig, opened: OpenedCheckpoint) -> Any:
    """Build the run's model on the meta device, with its trainable parameters selected.

    Raises:
        ConfigError: The checkpoint is inconsistent, or nothing would be trained.
    """
    architecture = opened.architecture
    with torch.device("meta"):
        model = architecture.model_class(architecture.config)
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
