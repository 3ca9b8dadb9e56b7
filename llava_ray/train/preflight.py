"""What a run is checked against before a worker starts: its model without weights, its encoder."""

from typing import Any

import torch

from llava_ray.config import TrainConfig
from llava_ray.data.loader.encode import Encoder, make_encoder
from llava_ray.model.open_checkpoint import OpenedCheckpoint, open_checkpoint
from llava_ray.train.param_groups import select_trainable


def open_run(config: TrainConfig) -> OpenedCheckpoint:
    """Return the checkpoint that a run begins with; no weights are read.

    Raises:
        ConfigError: there is no such checkpoint, or no template of that name.
    """
    return open_checkpoint(
        config.model,
        base=config.base,
        vision_tower=config.vision_tower,
        template=config.template,
    )


def build_meta_model(config: TrainConfig, opened: OpenedCheckpoint) -> Any:
    """Return the run's model with parts chosen and without any weights.

    Raises:
        ConfigError: the checkpoint does not hold together.
    """
    architecture = opened.architecture
    with torch.device("meta"):
        model = architecture.model_class(architecture.config)
        select_trainable(model, config)
    return model


def load_run_encoder(config: TrainConfig, opened: OpenedCheckpoint) -> Encoder:
    """Return what encodes a run's samples.

    Raises:
        ConfigError: the template is not known or does not fit the model.
    """
    return make_encoder(
        opened,
        max_length=config.data.max_length,
        truncates=config.data.over_long == "truncate",
    )
