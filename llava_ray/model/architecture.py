"""Decides which configuration and class a checkpoint's model has, and checks its weights for them.

Used by `open_checkpoint` and `loading`. Works on names and shapes only: a model on torch's meta
device says what is expected, the headers of the weight files say what is there.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.initialization import no_init_weights

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.checkpoint.llava_format import read_pinpoints
from llava_ray.model.checkpoint.locate import read_json
from llava_ray.model.checkpoint.weights import StoredTensor
from llava_ray.model.processor import START_END

_TOWERS = {
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
}
_NOT_TEXT = re.compile(
    r"mm_.*|image_.*|tune_.*|freeze_.*|unfreeze_.*|use_mm_.*|tokenizer_.*|s2.*|llava_ray_.*"
    r"|model_type|architectures|auto_map|torch_dtype|dtype|transformers_version|vision_tower"
    r"|quantization_config|_name_or_path|max_sequence_length"
)
"""Fields of LLaVA's flat config.json that do not belong to the language model."""

_TOWER_END = r"model\.vision_tower\.(post_layernorm|head)\..+"
_HARMLESS = {
    _TOWER_END: "LLaVA takes the features of an inner layer of the tower",
    r"model\.image_newline": "only mm_patch_merge_type=spatial_unpad has newlines",
    r"lm_head\.weight": "a model with tied embeddings computes its head from them",
}
"""Tensors that a model may do without, with the reasons. They may be missing or left over."""

IDENTITY = "torch.nn.modules.linear.Identity"
"""vLLM's name of the identity activation; transformers calls it "linear"."""

_EMBEDDINGS = re.compile(r"model\.language_model\.(embed_tokens|wte|embed_in)\.weight")


_NEWLINE_REMEDY = (
    "LLaVA's trainer leaves it out when it saves only a projector: load the whole checkpoint, or "
    "write the projector with `llava-ray export --to projector`"
)

_BAD_CONFIG = (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
"""What transformers raises for a configuration that it cannot build a model from."""


class Architecture(NamedTuple):
    """The model to build for a checkpoint.

    Attributes:
        config: transformers' configuration.
        model_class: transformers' class, or a subclass from `modeling`.
        shapes: the shapes of all its tensors, by their names in memory.
    """

    config: Any
    model_class: Any
    shapes: dict[str, tuple[int, ...]]


def describe_model(
    checkpoint: Checkpoint,
    stored: Mapping[str, StoredTensor],
    image_token_id: int,
    *,
    config: Any = None,
) -> Architecture:
    """Return what to build for a checkpoint.

    Args:
        checkpoint: the inspected checkpoint.
        stored: its tensors by their names in memory.
        image_token_id: the id that stands for a patch of an image.
        config: the result of `read_hf_config`, for transformers' format.

    Raises:
        ConfigError: no model can be built from the configuration.
    """
    try:
        if checkpoint.format == "hf":
            config = config or read_hf_config(checkpoint)
        else:
            config = _convert_llava_config(checkpoint, stored, image_token_id)
        for part in (config, config.text_config, config.vision_config):
            if hasattr(part, "quantization_config"):  # the weights are plain: it is left over
                del part.quantization_config
        model_class = _choose_class(checkpoint, config)
        with torch.device("meta"), no_init_weights():
            tensors = model_class(config).state_dict()
    except _BAD_CONFIG as error:
        raise ConfigError(_explain(checkpoint, error)) from error
    return Architecture(config, model_class, {n: tuple(t.shape) for n, t in tensors.items()})


def check_weights(
    checkpoint: Checkpoint, architecture: Architecture, stored: Mapping[str, StoredTensor]
) -> list[str]:
    """Return the problems of a checkpoint's weights, each with how to fix it."""
    folder = checkpoint.folder
    needed = {name for name in architecture.shapes if not re.fullmatch(_TOWER_END, name)}
    if architecture.config.tie_word_embeddings:
        needed.discard("lm_head.weight")
    problems = []
    missing = sorted(needed - set(stored))
    for part, remedy in (
        ("model.vision_tower.", "give the tower's folder or hub name as vision_tower"),
        ("model.multi_modal_projector.", _projector_remedy(checkpoint)),
        ("model.image_newline", _NEWLINE_REMEDY),
        ("", "the files do not belong to this config.json; copy all of them again"),
    ):
        if found := [name for name in missing if name.startswith(part)]:
            missing = [name for name in missing if not name.startswith(part)]
            problems.append(
                f"the weights of {str(folder)!r} lack {len(found)} tensors "
                f"({', '.join(found[:3])}): {remedy}"
            )
    if unused := find_unused(architecture, stored):
        problems.append(
            f"{stored[unused[0]].file}: {len(unused)} tensors are none of the model that "
            f"{folder / 'config.json'} describes ({', '.join(unused[:3])}): without them its "
            "answers would be wrong; correct architectures and model_type, copy the config.json "
            "that belongs to these weights, or check base"
        )
    for name in sorted(needed & set(stored)):
        expected, found = architecture.shapes[name], stored[name].shape
        if 0 in found:
            problems.append(
                f"{stored[name].file}: {name} has no values, shape {list(found)}: it was saved "
                "under ZeRO 3 without gathering the weights; save it again with "
                "stage3_gather_16bit_weights_on_model_save, or convert the checkpoint with "
                "DeepSpeed's zero_to_fp32.py"
            )
        elif expected != found:
            problems.append(
                f"{stored[name].file}: {name} has shape {list(found)}, and "
                f"{checkpoint.folder / 'config.json'} needs {list(expected)}: they belong to "
                "different models; check base and vision_tower"
            )
    return problems


def find_unused(architecture: Architecture, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Return the stored tensors that the model does not have and that are not harmless."""
    return [
        name
        for name in sorted(set(stored) - set(architecture.shapes))
        if not any(re.fullmatch(pattern, name) for pattern in _HARMLESS)
    ]


def find_unmarked(checkpoint: Checkpoint, architecture: Architecture, tokenizer: Any) -> list[str]:
    """Return a problem if `<im_start>` and `<im_end>` have no rows in the embeddings."""
    if checkpoint.format == "hf" or not checkpoint.uses_start_end:
        return []
    rows = architecture.config.text_config.vocab_size
    if max(tokenizer.convert_tokens_to_ids(list(START_END))) < rows:
        return []
    return [
        f"{checkpoint.folder / 'config.json'} has mm_use_im_start_end, and the {rows} rows of the "
        "embeddings are too few for <im_start> and <im_end>: give as base the language model whose "
        "embeddings were grown for them"
    ]


def read_hf_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration of a checkpoint in its own format.

    Raises:
        ConfigError: transformers does not accept it.
    """
    from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

    classes = {
        "llava": LlavaConfig,
        "llava_next": LlavaNextConfig,
        "llava_onevision": LlavaOnevisionConfig,
    }
    try:
        config: Any = classes[checkpoint.model_type](**copy.deepcopy(checkpoint.config))
    except _BAD_CONFIG as error:
        raise ConfigError(_explain(checkpoint, error)) from error
    if config.projector_hidden_act == IDENTITY:
        config.projector_hidden_act = "linear"
    config.mm_projector_type = checkpoint.projector
    config.mm_patch_merge_type = checkpoint.merge_type
    return config


def _convert_llava_config(
    checkpoint: Checkpoint, stored: Mapping[str, StoredTensor], image_token_id: int
) -> Any:
    from transformers import CONFIG_MAPPING, LlavaConfig, LlavaNextConfig

    fields = {n: v for n, v in checkpoint.config.items() if not _NOT_TEXT.fullmatch(n)}
    embeddings = next((t for n, t in stored.items() if _EMBEDDINGS.fullmatch(n)), None)
    if embeddings is not None:  # non_lora_trainables.bin may have grown them
        fields["vocab_size"] = embeddings.shape[0]
    text_config = CONFIG_MAPPING[checkpoint.text_model_type](**fields)
    if checkpoint.text_model_type == "mpt":
        _check_mpt(checkpoint, text_config)
    vision_config, missing_layers = _describe_tower(checkpoint, stored)
    layer = int(checkpoint.config.get("mm_vision_select_layer", -2))
    if layer < 0:  # if the stored tower ends before that layer, its last one
        layer = min(layer + missing_layers, -1)
    keeps_cls = checkpoint.config.get("mm_vision_select_feature") == "cls_patch"
    has_cls = vision_config.model_type == "clip_vision_model"
    is_tied = "lm_head.weight" not in stored and text_config.tie_word_embeddings
    common = {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_index": image_token_id,
        "image_seq_length": (vision_config.image_size // vision_config.patch_size) ** 2
        + int(keeps_cls and has_cls),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "full" if keeps_cls or not has_cls else "default",
        "tie_word_embeddings": is_tied,
        "mm_projector_type": checkpoint.projector,
        "mm_patch_merge_type": checkpoint.merge_type,
    }
    text_config.tie_word_embeddings = is_tied
    if checkpoint.aspect_mode != "anyres":
        return LlavaConfig(**common)
    pinpoints = read_pinpoints(checkpoint.folder, checkpoint.config)
    return LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)


def _describe_tower(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> tuple[Any, int]:
    """Return the tower's configuration, and how many of its last layers are not stored.

    Checkpoints with a SigLIP tower lack the layers after the one whose features are used.
    """
    from transformers import CONFIG_MAPPING

    assert checkpoint.tower_folder is not None
    file = checkpoint.tower_folder / "config.json"
    found = read_json(file)
    kind = _TOWERS.get(str(found.get("model_type")))
    if kind is None:
        raise ConfigError(
            f"{file}: the vision tower has model_type {found.get('model_type')!r}; only CLIP and "
            "SigLIP towers can be loaded"
        )
    fields = {**(found.get("vision_config") or found), "model_type": kind}
    fields = {n: v for n, v in fields.items() if n not in ("torch_dtype", "dtype", "architectures")}
    config: Any = CONFIG_MAPPING[kind](**fields)
    layers = {
        int(match[1])
        for name in stored
        if (match := re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", name))
    }
    missing = config.num_hidden_layers - (max(layers) + 1) if layers else 0
    if missing > 0:
        config.num_hidden_layers -= missing
    if kind == "siglip_vision_model":
        config.vision_use_head = False
    return config, max(missing, 0)


def _check_mpt(checkpoint: Checkpoint, config: Any) -> None:
    """Check for what transformers' MPT supports: ALiBi with a maximum bias of 8, no QK norm."""
    attention = config.attn_config
    for name, only in (("alibi", True), ("alibi_bias_max", 8), ("qk_ln", False)):
        if getattr(attention, name) != only:
            raise ConfigError(
                f"{checkpoint.folder / 'config.json'}: attn_config.{name}="
                f"{getattr(attention, name)!r} is not supported for MPT, only {only!r}"
            )


def _choose_class(checkpoint: Checkpoint, config: Any) -> Any:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextForConditionalGeneration,
        LlavaOnevisionForConditionalGeneration,
    )

    from llava_ray.model.modeling import Llava, LlavaAnyres, LlavaNewline

    if checkpoint.model_type == "llava_onevision":
        return LlavaOnevisionForConditionalGeneration
    plain = (
        checkpoint.projector == "mlp2x_gelu"
        and checkpoint.text_model_type not in ("mpt", "gpt_neox")
        and config.image_token_id < config.text_config.vocab_size
    )
    if checkpoint.model_type == "llava_next":
        is_hf = checkpoint.format == "hf"
        return LlavaNextForConditionalGeneration if plain and is_hf else LlavaAnyres
    if checkpoint.merge_type == "spatial_unpad":
        return LlavaNewline
    return LlavaForConditionalGeneration if plain else Llava


def _projector_remedy(checkpoint: Checkpoint) -> str:
    if checkpoint.kind == "lora":
        return (
            "non_lora_trainables.bin, which LLaVA's trainer writes when it is done, is missing or "
            "has none of them; copy it from where the adapter was trained"
        )
    return "copy mm_projector.bin, or all weight files, from where the checkpoint came from"


def _explain(checkpoint: Checkpoint, error: Exception) -> str:
    vision = checkpoint.config.get("vision_config") or {}
    if checkpoint.format == "hf" and (kind := vision.get("model_type", "clip")) not in _TOWERS:
        return (
            f"{checkpoint.folder / 'config.json'}: the vision tower has model_type {kind!r}; only "
            "CLIP and SigLIP towers can be loaded"
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{checkpoint.folder / 'config.json'} does not describe a model that can be built: "
        f"{reason[:300]}; copy it again from where the checkpoint came from"
    )
