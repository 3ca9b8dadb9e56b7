"""Reads and checks the config.json of LLaVA's own checkpoint format.

Used by `inspect` to recognise the format and to find the vision tower. Field names and defaults are
those of LLaVA 1.2.
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.locate import REMEDY, find_folder
from llava_ray.model.checkpoint.tensor_names import count_projector_layers

TEXT_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mpt": "mpt",
    "llava_qwen": "qwen2",
    "llava_gemma": "gemma",
}
"""The language model's type, by the `model_type` in a config.json of LLaVA's format."""

LLAVA_CLASSES = {
    "llama": ("llava", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mpt": ("llava_mpt", "LlavaMptForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "gemma": ("llava_gemma", "LlavaGemmaForCausalLM"),
}
"""`model_type` and class in a config.json of LLaVA's format, by the language model's type.

LLaVA's code treats "llava" and "llava_llama" alike; SGLang knows only the first.
"""

_CLASS = re.compile(r"Llava([A-Z]\w*)ForCausalLM")
_LANGUAGE_MODELS = {
    "llama": "llama", "mistral": "mistral", "mpt": "mpt", "qwen": "qwen2", "gemma": "gemma",
}  # fmt: skip
"""The language model's type, by its name in a class of LLaVA's code."""

_LLAVA_TEXTS = ("llama", "mistral", "mpt")
"""The language models of LLaVA's own code; LLaVA-NeXT's has more."""

_NEXT_FIELDS = re.compile(r"mm_(newline_position|spatial_pool_\w+|tunable_parts)")
"""Fields that only LLaVA-NeXT's trainer writes, most of them whatever it was asked to do."""

RESERVED = re.compile(
    r"mm_.*|image_.*|tune_.*|freeze_.*|unfreeze_.*|use_mm_.*|tokenizer_.*|llava_ray_.*"
    r"|version|_name_or_path"
)
"""Fields that LLaVA's code and this package read, in addition to the language model's own."""

ASPECT_MODES = ("square", "pad", "anyres")
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def is_llava_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is in LLaVA's own format."""
    if "text_config" in config or "vision_config" in config:
        return False
    return any(name.startswith("mm_") for name in config) or config.get("model_type") in TEXT_TYPES


def read_text_type(config: Mapping[str, Any]) -> str | None:
    """Return the language model's type from a config.json of LLaVA's format, or None if unknown.

    `architectures` tells before `model_type`: LLaVA's first checkpoints (v0) and those of
    LLaVA-NeXT's trainer have the language model's own `model_type`, and published ones were edited
    to "llava" whatever their language model is.
    """
    for name in config.get("architectures") or ():
        if match := _CLASS.fullmatch(str(name)):
            return _LANGUAGE_MODELS.get(match[1].lower())
    kind = str(config.get("model_type"))
    if kind in LLAVA_CLASSES and "mm_vision_tower" in config:
        return kind
    return TEXT_TYPES.get(kind)


def read_aspect(config: Mapping[str, Any]) -> str:
    """Return how images are fitted to the tower's input size."""
    return config.get("image_aspect_ratio") or "square"


def is_from_next(config: Mapping[str, Any]) -> bool:
    """Return whether LLaVA-NeXT's code (LLaVA-VL/LLaVA-NeXT) trained a checkpoint.

    Otherwise LLaVA's own (haotian-liu/LLaVA) did, which also trained LLaVA 1.6. The two compute
    differently where `has_own_tower` and `read_merge_type` say so.
    """
    if any(_NEXT_FIELDS.fullmatch(name) for name in config):
        return True
    return read_text_type(config) not in (None, *_LLAVA_TEXTS)


def has_own_tower(config: Mapping[str, Any]) -> bool:
    """Return whether the vision tower in a checkpoint's weights is the one to compute with.

    LLaVA-NeXT's code always takes it: a fine-tune that did not train the tower holds the trained
    tower of the model that it began with. LLaVA's code takes the tower's own files unless the tower
    was trained.
    """
    return is_from_next(config) or bool(config.get("unfreeze_mm_vision_tower"))


def read_merge_type(config: Mapping[str, Any]) -> str:
    """Return how the tiles of an image are joined, and whether a newline ends an image.

    "spatial_unpad" without tiles: LLaVA-NeXT's code puts one newline behind each image; LLaVA's
    puts none.
    """
    merge = config.get("mm_patch_merge_type") or "flat"
    if read_aspect(config) == "anyres" or (is_from_next(config) and "unpad" in merge):
        return merge
    return "flat"


def check_llava_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that everything a config.json of LLaVA's format asks for is supported.

    Raises:
        ConfigError: something is not; the message names the field.
    """
    where = f"{folder / 'config.json'}: "
    if config.get("s2"):
        raise ConfigError(f"{where}S2 vision towers (s2=true) are not supported: train without S2")
    if config.get("mm_resampler_type"):
        raise ConfigError(f"{where}resamplers (mm_resampler_type) are not supported")
    projector = config.get("mm_projector_type") or "linear"
    try:
        count_projector_layers(projector)
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error
    aspect, merge = read_aspect(config), config.get("mm_patch_merge_type") or "flat"
    if aspect not in ASPECT_MODES:
        known = ", ".join(ASPECT_MODES)
        raise ConfigError(f"{where}image_aspect_ratio={aspect!r} is not known: use {known}")
    if merge not in MERGE_TYPES:
        known = ", ".join(MERGE_TYPES)
        raise ConfigError(f"{where}mm_patch_merge_type={merge!r} is not known: use {known}")
    feature = config.get("mm_vision_select_feature") or "patch"
    if feature not in ("patch", "cls_patch"):
        raise ConfigError(f"{where}mm_vision_select_feature={feature!r}: use patch or cls_patch")
    if aspect == "anyres":
        read_pinpoints(folder, config)
        if feature == "cls_patch" and merge != "flat":
            raise ConfigError(
                f"{where}cls_patch features have a class token in each tile, which only "
                f"mm_patch_merge_type=flat can join, not {merge}"
            )


def read_pinpoints(folder: Path, config: Mapping[str, Any]) -> list[list[int]]:
    """Return the sizes [height, width] that anyres may choose from.

    LLaVA writes them as (width, height), in a list or as text.

    Raises:
        ConfigError: there are none, or they are not pairs of numbers.
    """
    found = config.get("image_grid_pinpoints")
    try:
        pairs = ast.literal_eval(found) if isinstance(found, str) else found
        sizes = [[int(height), int(width)] for width, height in pairs or ()]
    except (ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"{folder / 'config.json'}: image_grid_pinpoints={found!r} is not a list of "
            "(width, height): anyres needs one"
        ) from error
    if not sizes:
        raise ConfigError(f"{folder / 'config.json'}: image_grid_pinpoints is empty")
    return sizes


def find_tower(
    folder: Path, named: str, given: str | Path | None, base: Path | None = None
) -> Path:
    """Return the folder of the vision tower that a checkpoint in LLaVA's format needs.

    Raises:
        ConfigError: it was not found.
    """
    if given is not None:
        tower = find_folder(given)
    else:
        if not named:
            raise ConfigError(
                f"{folder / 'config.json'} names no vision tower (mm_vision_tower): give its "
                "folder or hub name as vision_tower"
            )
        near = [place for place in (folder, base) if place]
        places = [p / named for place in near for p in (place, place.parent)]
        places += [place / Path(named).name for place in near]  # an absolute path that has moved
        places += [place / "vision_tower" for place in near]
        tower = next((place for place in places if (place / "config.json").is_file()), None)
        try:
            tower = tower or find_folder(named)
        except ConfigError as error:
            raise ConfigError(
                f"{folder / 'config.json'} names the vision tower {named!r}, which was not found "
                f"({error.message}); give its folder or hub name as vision_tower"
            ) from error
    for name in ("config.json", "preprocessor_config.json"):
        if not (tower / name).is_file():
            raise ConfigError(f"the vision tower {str(tower)!r} lacks its {name}: {REMEDY}")
    return tower
