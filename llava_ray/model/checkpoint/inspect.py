"""Recognises what a folder holds: the kind of checkpoint, its format, and the files of the model.

The first step of `open_checkpoint`. Reads configurations, lists of files and the headers of weight
files, and never looks at the folder's name (LLaVA's own code decides by substrings of it).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.llava_format import (
    TEXT_TYPES,
    check_llava_config,
    find_tower,
    has_own_tower,
    is_llava_config,
    read_aspect,
    read_merge_type,
    read_text_type,
)
from llava_ray.model.checkpoint.locate import REMEDY, check_pointer, find_folder, read_json
from llava_ray.model.checkpoint.tensor_names import CheckpointFormat
from llava_ray.model.checkpoint.weights import WeightFiles, find_weights, open_file

CheckpointKind = Literal["full", "projector", "lora", "adapter", "delta"]

HF_TYPES = ("llava", "llava_next", "llava_onevision")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LINEAR = re.compile(r"multi_modal_projector\.linear_\d+\.weight$")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        folder: its path.
        kind: "full" (all weights); "projector" (`mm_projector.bin` over a language model); "lora"
            (by LLaVA's trainer: adapter, `non_lora_trainables.bin`, config.json); "adapter" (any
            other PEFT adapter over a LLaVA); "delta" (to be added to a language model).
        format: "hf" (transformers') or "llava" (LLaVA's own).
        model_type: transformers' name of the model: "llava", "llava_next" (anyres) or
            "llava_onevision".
        text_model_type: that of the language model: "llama", "mistral", "mpt", ...
        config: the content of config.json; for an adapter, that of its base.
        tower: the vision tower's name in the configuration.
        projector: "linear", "mlpNx_gelu" or "identity".
        aspect_mode: "square", "pad" or "anyres".
        merge_type: how the tiles of anyres are joined: "flat", "spatial" or "spatial_unpad". The
            last puts one newline behind an image in the other modes, which otherwise are "flat".
        base: the folder of the language model or LLaVA that this belongs to, if there is one.
        tower_folder: the folder with the vision tower's configuration; LLaVA's format only.
        tokenizer_folder: the folder that has the tokenizer.
        weights: the weight files, in the order in which they are applied.
        adapters: folders of adapters that are merged into the weights, in that order.
        template: the name of a conversation template, if config.json has one.
    """

    folder: Path
    kind: CheckpointKind
    format: CheckpointFormat
    model_type: str
    text_model_type: str
    config: dict[str, Any] = field(repr=False)
    tower: str
    projector: str
    aspect_mode: str
    merge_type: str
    base: Path | None
    tower_folder: Path | None
    tokenizer_folder: Path
    weights: tuple[WeightFiles, ...] = field(repr=False)
    adapters: tuple[Path, ...]
    template: str | None

    @property
    def uses_start_end(self) -> bool:
        """Whether each image is enclosed in `<im_start>` and `<im_end>`."""
        return bool(self.config.get("mm_use_im_start_end"))

    @property
    def uses_patch_token(self) -> bool:
        """Whether the tokenizer has `<im_patch>`, a token that prompts never use."""
        return bool(self.config.get("mm_use_im_patch_token", True))

    @property
    def in_pieces(self) -> bool:
        """Whether each piece of a prompt between two images is tokenised by itself, as LLaVA does.

        False for checkpoints that `export` converted from transformers' format, where the model
        may have been trained on whole prompts.
        """
        return self.format == "llava" and not self.config.get("llava_ray_whole_prompts")

    @property
    def metadata(self) -> dict[str, str]:
        """The facts that help to choose a conversation template."""
        facts = {
            "model_type": self.config.get("model_type"),
            "architecture": (self.config.get("architectures") or [None])[0],
            "text_model_type": self.text_model_type,
            "version": self.config.get("version"),
            "template": self.template,
            "base_model": self.config.get("_name_or_path"),
            "aspect_mode": self.aspect_mode,
        }
        return {name: str(value) for name, value in facts.items() if value}


def inspect_checkpoint(
    path: str | Path, *, base: str | Path | None = None, vision_tower: str | Path | None = None
) -> Checkpoint:
    """Return what the folder at `path` holds.

    Args:
        path: see `find_folder`.
        base: the language model (or LLaVA) that a projector, an adapter or a delta belongs to; by
            default the one that the adapter's configuration names.
        vision_tower: folder or hub name of the tower; by default the one that config.json names,
            which is looked for as a path, inside the folder, beside it, and on the hub.

    Raises:
        ConfigError: it is not a checkpoint, not of a known kind, or a file it needs is missing.
    """
    folder = find_folder(path)
    adapter = _find_adapter(folder)
    if adapter and not (folder / "config.json").is_file():
        return _inspect_adapter(folder, adapter, base, vision_tower)
    config = _read_config(folder)
    if is_llava_config(config):
        return _inspect_llava(folder, config, adapter, base, vision_tower)
    if adapter and not find_weights(folder):
        return _inspect_adapter(folder, adapter, base, vision_tower)
    _refuse(folder, base=base, vision_tower=vision_tower)
    return _inspect_hf(folder, config)


def _inspect_hf(folder: Path, config: dict[str, Any]) -> Checkpoint:
    weights = find_weights(folder)
    require_files(folder, "weights", weights)
    tokenizer = _existing(folder, TOKENIZER_FILES)
    require_files(folder, "tokenizer", tokenizer, TOKENIZER_FILES)
    check_pointer(tokenizer[0])
    images = _existing(folder, PROCESSOR_FILES)
    require_files(folder, "image preprocessing", images, PROCESSOR_FILES)
    vision = config.get("vision_config") or {}
    return Checkpoint(
        folder=folder,
        kind="full",
        format="hf",
        model_type=config["model_type"],
        text_model_type=(config.get("text_config") or {}).get("model_type", "llama"),
        config=config,
        tower=vision.get("model_type", "clip_vision_model"),
        projector=_tell_projector(weights),
        aspect_mode=_read_hf_aspect(folder, config),
        merge_type="flat" if config["model_type"] == "llava" else "spatial_unpad",
        base=None,
        tower_folder=None,
        tokenizer_folder=folder,
        weights=(WeightFiles(weights),),
        adapters=(),
        template=config.get("llava_ray_template"),
    )


def _inspect_llava(
    folder: Path,
    config: dict[str, Any],
    adapter: Path | None,
    base: str | Path | None,
    vision_tower: str | Path | None,
) -> Checkpoint:
    weights = () if adapter else find_weights(folder)
    kind = _tell_kind(folder, adapter, weights, base)
    base_folder = None
    parts: tuple[WeightFiles, ...] = ()
    if kind != "full":
        base_folder = _find_base(folder, kind, adapter, base or config.get("llava_ray_base"))
        parts = _read_base(base_folder)
    if kind in ("full", "delta"):
        parts = (*parts, WeightFiles(weights, "delta" if kind == "delta" else "weights"))
    extra = {"projector": "mm_projector.bin", "lora": "non_lora_trainables.bin"}.get(kind)
    if extra and (folder / extra).is_file():
        parts = (*parts, WeightFiles((folder / extra,)))
    check_llava_config(folder, config)
    tower = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    tower_folder = find_tower(folder, tower, vision_tower, base_folder)
    # Most checkpoints contain the tower too, trained or in a lower precision.
    tower_role = "tower" if has_own_tower(config) else "frozen_tower"
    return Checkpoint(
        folder=folder,
        kind=kind,
        format="llava",
        model_type="llava_next" if read_aspect(config) == "anyres" else "llava",
        text_model_type=read_text_type(config) or "llama",
        config=config,
        tower=str(vision_tower or tower),
        projector=config.get("mm_projector_type") or "linear",
        aspect_mode=read_aspect(config),
        merge_type=read_merge_type(config),
        base=base_folder,
        tower_folder=tower_folder,
        tokenizer_folder=_find_tokenizer(folder, base_folder),
        weights=(WeightFiles(find_weights(tower_folder), tower_role), *parts),
        adapters=(folder,) if kind == "lora" else (),
        template=config.get("llava_ray_template"),
    )


def _inspect_adapter(
    folder: Path, adapter: Path, base: str | Path | None, vision_tower: str | Path | None
) -> Checkpoint:
    base_folder = _find_base(folder, "adapter", adapter, base)
    below = inspect_checkpoint(base_folder, vision_tower=vision_tower)
    extra = folder / "non_lora_trainables.bin"
    has_tokenizer = _existing(folder, TOKENIZER_FILES)
    return Checkpoint(
        **{
            **vars(below),
            "folder": folder,
            "kind": "adapter",
            "base": base_folder,
            "tokenizer_folder": folder if has_tokenizer else below.tokenizer_folder,
            "weights": (*below.weights, WeightFiles((extra,)))
            if extra.is_file()
            else below.weights,
            "adapters": (*below.adapters, folder),
        }
    )


def require_files(
    folder: Path, what: str, found: tuple[Path, ...], names: tuple[str, ...] = ()
) -> None:
    """Raise a ConfigError that says what a folder lacks, if nothing was found."""
    if not found:
        names = names or ("model.safetensors", "model.safetensors.index.json")
        raise ConfigError(
            f"model {str(folder)!r} lacks its {what} ({' or '.join(names)}): {REMEDY}"
        )


def _tell_kind(
    folder: Path, adapter: Path | None, weights: tuple[Path, ...], base: str | Path | None
) -> CheckpointKind:
    if adapter:
        return "lora"
    if weights:
        return "delta" if base is not None else "full"
    if (folder / "mm_projector.bin").is_file():
        return "projector"
    if (folder / "non_lora_trainables.bin").is_file():
        raise ConfigError(
            f"model {str(folder)!r} has non_lora_trainables.bin and no adapter_config.json: "
            f"{REMEDY}"
        )
    raise ConfigError(
        f"model {str(folder)!r} lacks its weights (model.safetensors, pytorch_model.bin, an "
        f"adapter or mm_projector.bin): {REMEDY}"
    )


def _find_base(
    folder: Path, kind: CheckpointKind, adapter: Path | None, base: str | Path | None
) -> Path:
    named = base
    if named is None and adapter:
        named = read_json(adapter).get("base_model_name_or_path")
    if not named:
        raise ConfigError(
            f"model {str(folder)!r} holds only a {kind}: give the language model that it was "
            "trained on as base"
        )
    try:
        return find_folder(named)
    except ConfigError as error:
        raise ConfigError(
            f"the base {str(named)!r} of {str(folder)!r} was not found: {error.message}; give the "
            "folder or hub name of the model that it was trained on as base"
        ) from error


def _read_base(folder: Path) -> tuple[WeightFiles, ...]:
    """Return the weight files of a base: a language model, or a LLaVA with all its weights."""
    if _find_adapter(folder) and not find_weights(folder):
        raise ConfigError(
            f"the base {str(folder)!r} is itself an adapter: merge it first, "
            "`llava-ray export PATH OUT --to original`, and give OUT as base"
        )
    _read_json_config(folder)
    weights = find_weights(folder)
    require_files(folder, "weights", weights)
    return (WeightFiles(weights),)


def _find_adapter(folder: Path) -> Path | None:
    file = folder / "adapter_config.json"
    return file if file.is_file() else None


def _find_tokenizer(folder: Path, base: Path | None) -> Path:
    for place in (folder, base):
        if place and (files := _existing(place, TOKENIZER_FILES)):
            check_pointer(files[0])
            return place
    raise ConfigError(
        f"model {str(folder)!r} lacks its tokenizer ({' or '.join(TOKENIZER_FILES)}): {REMEDY}"
    )


def _existing(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).is_file())


def _read_json_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"model {str(folder)!r} is not a checkpoint, it has no config.json: "
            "give the folder that holds config.json and the weights"
        )
    return read_json(file)


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json_config(folder)
    kind = config.get("model_type")
    if kind in HF_TYPES and "text_config" in config:
        return config
    if is_llava_config(config) and read_text_type(config):
        return config
    if kind == "llava" and "vision_config" in config:
        return config
    known = ", ".join(dict.fromkeys([*HF_TYPES, *TEXT_TYPES]))
    raise ConfigError(
        f"model {str(folder)!r} has model_type {kind!r} and architectures "
        f"{config.get('architectures')}, which is not a LLaVA that can be loaded ({known}): give "
        "the folder of a LLaVA, or build one from this with `llava-ray build`"
    )


def _read_hf_aspect(folder: Path, config: Mapping[str, Any]) -> str:
    if config["model_type"] != "llava":
        return "anyres"
    for file in _existing(folder, PROCESSOR_FILES):
        settings = read_json(file)
        if (settings.get("image_processor") or settings).get("do_pad"):
            return "pad"
    return "square"


def _tell_projector(weights: tuple[Path, ...]) -> str:
    """Return the projector's type, judged by the layers in the weight files."""
    names = {name for file in weights for name in open_file(file)}
    count = sum(bool(_LINEAR.search(name)) for name in names)
    return {0: "identity", 1: "linear"}.get(count, f"mlp{count}x_gelu")


def _refuse(folder: Path, **given: str | Path | None) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"model {str(folder)!r} is complete, and {name}={str(value)!r} would have no "
                f"effect: leave {name} out"
            )
