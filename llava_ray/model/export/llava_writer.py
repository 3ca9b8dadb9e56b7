"""Writes a model in memory in LLaVA's own format, which its code and SGLang's native class read.

The last step of `export --to original` and `--to projector`. The folder contains:

    config.json                 the language model's fields and LLaVA's `mm_*` beside them
    model*.safetensors          all weights, `model.mm_projector.*`, `model.vision_tower.*`
    tokenizer, preprocessor_config.json
    clip-vision-tower/          the tower as its own checkpoint: LLaVA's code reads the tower's
                                architecture and image preprocessing from it

config.json has the absolute path of that folder (`mm_vision_tower`), because LLaVA's code resolves
it relative to wherever it runs. Field names and defaults are those of LLaVA 1.2.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.checkpoint.llava_format import LLAVA_CLASSES, RESERVED
from llava_ray.model.checkpoint.tensor_names import from_memory
from llava_ray.model.export.atomic_folder import MAX_SHARD_SIZE, write_json, write_shards
from llava_ray.model.export.hf_writer import write_generation
from llava_ray.model.export.projector import PREFIX, read_projector
from llava_ray.model.processor import IMAGE_SETTINGS

PROJECTOR_FILE = "mm_projector.bin"


def check_llava_format(model_type: str, text_model_type: str, *, select_layer: Any) -> None:
    """Check that LLaVA's own format can express a model.

    Args:
        model_type: the LLaVA's ("llava", "llava_next", "llava_onevision").
        text_model_type: the language model's.
        select_layer: the layer of the tower whose features are used, or several.

    Raises:
        ConfigError: it cannot; the message says which part it does not support.
    """
    if model_type == "llava_onevision":
        raise ConfigError("LLaVA's own format does not support LLaVA-OneVision: use --to hf")
    if text_model_type not in LLAVA_CLASSES:
        raise ConfigError(
            f"LLaVA's own format does not support the language model {text_model_type!r} (only "
            f"{', '.join(LLAVA_CLASSES)}): use --to hf"
        )
    if not isinstance(select_layer, int):
        raise ConfigError(
            f"LLaVA's own format supports one layer of the tower, and vision_feature_layer is "
            f"{select_layer}: use --to hf"
        )


def write_llava(
    folder: Path,
    model: Any,
    processor: Any,
    checkpoint: Checkpoint,
    *,
    place: Path,
    tower_name: str | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    fields: Mapping[str, Any],
) -> None:
    """Write the whole folder.

    Args:
        folder: an empty one.
        model: transformers' or ours, not quantized, in the precision to write.
        processor: transformers'.
        checkpoint: what the model was loaded from.
        place: the folder's final path.
        tower_name: the tower's name in config.json; no folder is written for it then.
        max_shard_size: maximum size of a weight file.
        fields: more fields for config.json.

    Raises:
        ConfigError: the format cannot express the model.
    """
    projector, layers = read_projector(model)
    write_shards(folder, _name_tensors(model, projector, layers), max_shard_size=max_shard_size)
    tower = tower_name or write_tower(folder, model, processor, place)
    config = describe_llava_config(model, processor, checkpoint, projector, tower)
    # Otherwise LLaVA's code would ignore the tower's weights in the checkpoint.
    write_json(folder / "config.json", {**config, "unfreeze_mm_vision_tower": True, **fields})
    write_json(folder / "preprocessor_config.json", describe_images(model, processor))
    write_generation(folder, model, processor.tokenizer)
    for file in find_tokenizer_files(checkpoint.tokenizer_folder):
        shutil.copyfile(file, folder / file.name)
    if processor.chat_template:
        (folder / "chat_template.jinja").write_text(processor.chat_template)


def write_projector(
    folder: Path,
    model: Any,
    processor: Any,
    checkpoint: Checkpoint,
    *,
    place: Path,
    tower_name: str | None = None,
    fields: Mapping[str, Any],
) -> None:
    """Write `mm_projector.bin` and its config.json, to be loaded over a language model.

    Args:
        folder: as of `write_llava`, as are the others.

    Raises:
        ConfigError: the format cannot express it, or more than the projector was trained.
    """
    if checkpoint.uses_start_end:
        raise ConfigError(
            "this checkpoint uses <im_start> and <im_end>, whose embeddings a projector does not "
            "contain: use --to original"
        )
    projector, layers = read_projector(model)
    named = dict(_name_tensors(model, projector, layers))
    kept = {n: t.clone() for n, t in named.items() if "mm_projector" in n or "image_newline" in n}
    torch.save(kept, folder / PROJECTOR_FILE)
    tower = tower_name or write_tower(folder, model, processor, place)
    config = describe_llava_config(model, processor, checkpoint, projector, tower)
    # LLaVA's code reads this one with AutoConfig, which takes "llava" for transformers' own.
    text = checkpoint.text_model_type
    config["model_type"] = "llava_llama" if text == "llama" else config["model_type"]
    write_json(folder / "config.json", {**config, **fields})


def describe_llava_config(
    model: Any, processor: Any, checkpoint: Checkpoint, projector: str, tower: str
) -> dict[str, Any]:
    """Return config.json: the language model's fields and LLaVA's own."""
    config = model.config
    text = _flatten_text(config.text_config)
    kept = checkpoint.config if checkpoint.format == "llava" else {}
    kept = {n: v for n, v in kept.items() if RESERVED.fullmatch(n)}
    model_type, architecture = LLAVA_CLASSES[checkpoint.text_model_type]
    has_cls = config.vision_config.model_type == "clip_vision_model"
    keeps_cls = has_cls and config.vision_feature_select_strategy == "full"
    is_anyres = checkpoint.model_type == "llava_next"
    pinpoints = getattr(config, "image_grid_pinpoints", None) if is_anyres else None
    return {
        **text,
        **kept,
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "mm_vision_tower": tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": projector,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if keeps_cls else "patch",
        "mm_patch_merge_type": checkpoint.merge_type,
        "mm_use_im_start_end": checkpoint.uses_start_end,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": checkpoint.aspect_mode,
        "image_token_index": config.image_token_id,  # for SGLang, which places images by it
        "image_grid_pinpoints": pinpoints and [[width, height] for height, width in pinpoints],
        "tokenizer_model_max_length": min(
            processor.tokenizer.model_max_length,
            getattr(config.text_config, "max_seq_len", 0)
            or config.text_config.max_position_embeddings,
        ),
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
    }


def write_tower(folder: Path, model: Any, processor: Any, place: Path) -> str:
    """Write the tower as its own checkpoint; return its path for config.json.

    Args:
        folder: the LLaVA's folder.
        model: the LLaVA.
        processor: transformers'.
        place: the folder's final path.
    """
    config = model.config.vision_config
    is_clip = config.model_type == "clip_vision_model"
    name = "clip-vision-tower" if is_clip else "siglip-vision-tower"  # SGLang looks for these words
    (folder / name).mkdir()
    tower = model.model.vision_tower
    tensors = ((f"vision_model.{n}", tensor) for n, tensor in tower.state_dict().items())
    write_shards(folder / name, tensors)
    described = json.loads(config.to_json_string(use_diff=True))
    described |= {
        "architectures": ["CLIPVisionModel" if is_clip else "SiglipVisionModel"],
        "torch_dtype": str(next(tower.parameters()).dtype).removeprefix("torch."),
    }
    write_json(folder / name / "config.json", described)
    write_json(folder / name / "preprocessor_config.json", describe_images(model, processor))
    return str(place / name)


def describe_images(model: Any, processor: Any) -> dict[str, Any]:
    """Return a tower's preprocessor_config.json; the aspect mode is in the LLaVA's config.json."""
    is_clip = model.config.vision_config.model_type == "clip_vision_model"
    found = json.loads(processor.image_processor.to_json_string())
    settings = {name: found[name] for name in IMAGE_SETTINGS if found.get(name) is not None}
    kind = "CLIPImageProcessor" if is_clip else "SiglipImageProcessor"
    if not settings.get("do_center_crop"):
        settings.pop("crop_size", None)
    return {"image_processor_type": kind, **settings}


def find_tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer files in a folder."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    )
    return [folder / name for name in names if (folder / name).is_file()]


def _name_tensors(
    model: Any, projector: str, layers: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    text = config.text_config.model_type
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith(PREFIX)}
    for name, tensor in {**tensors, **layers}.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        yield from_memory(name, "llava", text_model_type=text, projector=projector), tensor


def _flatten_text(config: Any) -> dict[str, Any]:
    """Return a language model's fields in terms that transformers 4 and 5 both read."""
    fields = json.loads(config.to_json_string(use_diff=True))
    rope = fields.pop("rope_parameters", None) or {}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    if kind in ("linear", "dynamic"):
        fields["rope_scaling"] = {"type": kind, **rope}
    elif kind != "default":
        fields["rope_scaling"] = {"rope_type": kind, **rope}
    for name in ("dtype", "_name_or_path", "layer_types"):
        fields.pop(name, None)
    return fields
