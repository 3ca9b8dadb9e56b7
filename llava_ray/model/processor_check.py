"""Checks that a checkpoint's processor and its model agree on images, without any weights.

A processor that writes other numbers of image tokens than the tower gives features, or makes images
of other sizes, fails at the first image, or answers as if there were none. Called by `loading`,
`doctor` and the encoder of training with the same result.
"""

import re
from typing import Any

from PIL import Image

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.processor import encode_images

TOWERS = ("clip_vision_model", "siglip_vision_model")


def check_processor(checkpoint: Checkpoint, processor: Any, config: Any) -> None:
    """Check a processor against the model's configuration.

    Args:
        checkpoint: the inspected checkpoint.
        processor: transformers' processor.
        config: transformers' configuration of the model.

    Raises:
        ConfigError: they do not fit; the message names the field and its right value.
    """
    if problem := find_misfit(checkpoint, processor, config):
        raise ConfigError(problem)


def find_misfit(checkpoint: Checkpoint, processor: Any, config: Any) -> str:
    """Return what does not fit, and how to fix it; "" if everything fits."""
    vision = config.vision_config
    where = str(checkpoint.folder / "config.json")
    if vision.model_type not in TOWERS:
        return (
            f"{where}: the vision tower has model_type {vision.model_type!r}; only CLIP and SigLIP "
            "towers are supported: serve the checkpoint with vLLM itself (`vllm serve`)"
        )
    if problem := _find_bad_field(checkpoint, processor, config):
        return f"{where}: {problem}"
    try:
        pixels = encode_images(processor, [Image.new("RGB", (8, 8))])["pixel_values"]
    except Exception as error:  # noqa: BLE001 - whatever its settings make transformers raise
        return (
            f"{checkpoint.folder}: the image preprocessing cannot be used "
            f"({type(error).__name__}: {error}): copy preprocessor_config.json or "
            "processor_config.json again from where the checkpoint came from"
        )
    height, width = pixels.shape[-2:]
    if {height, width} != {vision.image_size}:
        return (
            f"{checkpoint.folder}: images are prepared with {width} x {height} pixels, and the "
            f"vision tower reads {vision.image_size} x {vision.image_size}: correct size and "
            "crop_size in the preprocessing, or image_size in config.json"
        )
    expected = _count_features(config)
    found = _count_written(processor, vision.image_size)
    if found == expected:
        return ""
    fields = "num_image_tokens"
    if not hasattr(processor, fields):
        fields = "patch_size, num_additional_image_tokens and vision_feature_select_strategy"
    return (
        f"{checkpoint.folder}: the processor writes {found} image tokens for a tile, and the "
        f"vision tower gives {expected} features: correct {fields} in processor_config.json and "
        "config.json"
    )


def _find_bad_field(checkpoint: Checkpoint, processor: Any, config: Any) -> str:
    """Return which field of config.json the model cannot compute images with; "" if none."""
    layers, num_layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -num_layers - 1 <= layer <= num_layers:
            return (
                f"the features of layer {layer} of the vision tower are asked for "
                f"(vision_feature_layer or mm_vision_select_layer), which has {num_layers} layers: "
                "-2 is LLaVA's"
            )
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    prepared = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if checkpoint.aspect_mode == "anyres" and _as_lists(pinpoints) != _as_lists(prepared):
        return (
            f"image_grid_pinpoints={pinpoints}, and the image preprocessing lays out tiles by "
            f"{prepared}: they belong to different checkpoints; copy both files again"
        )
    side = config.vision_config.image_size
    sizes = _as_lists(pinpoints)
    if odd := [size for size in sizes if len(size) != 2 or size[0] % side or size[1] % side]:
        return (
            f"image_grid_pinpoints has the size {odd[0]}, which is not made of tiles of {side} x "
            f"{side} pixels, as the vision tower reads them: use multiples of {side}"
        )
    if checkpoint.model_type == "llava_onevision":
        aspect = config.vision_aspect_ratio
        if not re.fullmatch(r"anyres_max_[1-9]\d*", aspect):
            return f"vision_aspect_ratio={aspect!r} is not known: write anyres_max_9"
    has_cls = config.vision_config.model_type == "clip_vision_model"
    keeps_cls = has_cls and config.vision_feature_select_strategy == "full"
    if keeps_cls and checkpoint.aspect_mode == "anyres" and checkpoint.merge_type != "flat":
        return (
            "vision_feature_select_strategy='full' keeps a class token in each tile, and the tiles "
            "are joined in rows of patches: write 'default'"
        )
    return ""


def _as_lists(pinpoints: Any) -> list[list[int]]:
    """Return sizes as lists; what is not a size becomes an empty one."""
    sizes = pinpoints if isinstance(pinpoints, list | tuple) else [pinpoints] if pinpoints else []
    return [list(size) if isinstance(size, list | tuple) else [] for size in sizes]


def _count_features(config: Any) -> int:
    """Return how many features the model takes of one tile."""
    vision = config.vision_config
    num_patches = (vision.image_size // vision.patch_size) ** 2
    num_features = num_patches + (vision.model_type == "clip_vision_model")
    return num_features - (config.vision_feature_select_strategy == "default")


def _count_written(processor: Any, image_size: int) -> int:
    """Return how many image tokens the processor writes for one tile."""
    if hasattr(processor, "num_image_tokens"):  # LLaVA-OneVision's
        return processor.num_image_tokens
    num_tokens = (image_size // processor.patch_size) ** 2 + processor.num_additional_image_tokens
    return num_tokens - (processor.vision_feature_select_strategy == "default")
