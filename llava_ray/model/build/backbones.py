"""Loads and checks the two models that a new LLaVA is built from.

For `build`: a causal language model with its tokenizer, and a vision tower.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import TOKENIZER_FILES, require_files
from llava_ray.model.checkpoint.locate import REMEDY, find_folder
from llava_ray.model.checkpoint.weights import find_weights, open_file
from llava_ray.model.export.piecewise_tokenizer import join_pieces
from llava_ray.template import IMAGE_TOKEN

KINDS = "llama, mistral, qwen2, qwen3, gemma, gemma3_text, gpt_neox"
"""Language models that are known to work in a LLaVA; others are tried and checked."""

TOWERS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}


class LanguageModel(NamedTuple):
    """A causal language model, and the tokenizer that belongs to it."""

    model: Any
    tokenizer: Any


class VisionTower(NamedTuple):
    """A vision tower, and the folder with its image preprocessing."""

    model: Any
    folder: Path

    @property
    def has_cls(self) -> bool:
        """Whether a class token precedes the patches, as in CLIP."""
        return self.model.config.model_type == "clip_vision_model"


def load_language_model(path: str | Path) -> LanguageModel:
    """Load a causal language model and its tokenizer, in the precision in which it is stored.

    Raises:
        ConfigError: there is none, or a LLaVA cannot be built from it.
    """
    from safetensors import SafetensorError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer

    folder = find_folder(path)
    config = _read_config(folder, "language model")
    if hasattr(config, "vision_config"):
        raise ConfigError(
            f"{str(path)!r} already has a vision tower (model_type {config.model_type!r}): give a "
            "language model that reads only text"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"{str(path)!r} has model_type {config.model_type!r}, which is not a language model "
            f"that continues text: use one of {KINDS}"
        )
    _check_weights(folder)
    found = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    require_files(folder, "tokenizer", found, TOKENIZER_FILES)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"the language model {str(path)!r} does not load: {error}; {REMEDY}"
        ) from error
    head = model.get_output_embeddings()
    if model.base_model is model or head is None or getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{str(path)!r} (model_type {config.model_type!r}) has no output head that a LLaVA can "
            f"use: use one of {KINDS}"
        )
    return LanguageModel(model.eval(), tokenizer)


def add_image_token(language: LanguageModel) -> LanguageModel:
    """Return the language model with a tokenizer that has `<image>`.

    If possible, the tokenizer gives whole prompts the ids that LLaVA's code computes piece by
    piece, so that the model reads the same ids in every format it is exported to.
    """
    tokenizer = language.tokenizer
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    with contextlib.suppress(ConfigError):
        tokenizer = join_pieces(tokenizer)
    return LanguageModel(language.model, tokenizer)


def load_tower(path: str | Path, *, dtype: torch.dtype) -> VisionTower:
    """Load a CLIP or SigLIP vision tower.

    Raises:
        ConfigError: there is none, or it is neither CLIP nor SigLIP.
    """
    import transformers
    from safetensors import SafetensorError

    folder = find_folder(path)
    config = _read_config(folder, "vision tower")
    if config.model_type not in TOWERS:
        raise ConfigError(
            f"the vision tower {str(path)!r} has model_type {config.model_type!r}: give a CLIP or "
            "SigLIP model"
        )
    if not (folder / "preprocessor_config.json").is_file():
        raise ConfigError(
            f"the vision tower {str(path)!r} lacks preprocessor_config.json, which says how "
            "images are prepared: copy it from where the tower came from"
        )
    _check_weights(folder)
    tower_class = getattr(transformers, TOWERS[config.model_type])
    vision = getattr(config, "vision_config", config)
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False  # its pooled output is not used by LLaVA
    try:
        loaded, report = tower_class.from_pretrained(
            folder, config=vision, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"the vision tower {str(path)!r} does not load: {error}; {REMEDY}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"the vision tower {str(path)!r} lacks {len(missing)} tensors "
            f"({', '.join(missing[:3])}): its weights do not belong to its config.json"
        )
    return VisionTower(loaded.eval(), folder)


def _check_weights(folder: Path) -> None:
    """Raise a ConfigError that names the file if weights are missing or damaged."""
    files = find_weights(folder)
    require_files(folder, "weights", files)
    for file in files:
        open_file(file)


def _read_config(folder: Path, what: str) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"the {what} {str(folder)!r} has no config.json: give the folder of a model"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the {what} {str(folder)!r} is not a model that transformers knows: {error}"
        ) from error
