"""What a run is checked against before a worker starts: its model without weights, its encoder."""

from typing import Any

import torch

from llava_ray.config import TrainConfig
from llava_ray.data.loader.encode import Encoder, load_encoder
from llava_ray.model.architecture import describe_model
from llava_ray.model.checkpoint.inspect import inspect_checkpoint
from llava_ray.model.checkpoint.weights import open_parts
from llava_ray.model.loading import read_processor
from llava_ray.train.param_groups import select_trainable


def build_meta_model(config: TrainConfig) -> Any:
    """Return the run's model with parts chosen and without any weights.

    Raises:
        ConfigError: the checkpoint does not hold together.
    """
    checkpoint = inspect_checkpoint(
        config.model, base=config.base, vision_tower=config.vision_tower
    )
    stored = open_parts(checkpoint.parts)
    processor = read_processor(checkpoint)
    architecture = describe_model(checkpoint, stored, processor.image_token_id)
    with torch.device("meta"):
        model = architecture.model_class(architecture.config)
        select_trainable(model, config)
    return model


def load_run_encoder(config: TrainConfig) -> Encoder:
    """Return what encodes a run's samples.

    Raises:
        ConfigError: the template is not known or does not fit the model.
    """
    return load_encoder(
        config.model,
        base=config.base,
        vision_tower=config.vision_tower,
        template=config.template,
        max_length=config.data.max_length,
        truncates=config.data.over_long == "truncate",
    )
