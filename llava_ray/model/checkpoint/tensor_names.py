"""Translates between the tensor names in checkpoint files and the names in memory.

Used by the readers of files (weights, deltas, adapters), the model and the writers (export). Pure
functions on strings; no file is opened here.

The names in memory are those of transformers 5.19's `LlavaForConditionalGeneration.state_dict()`:

    model.vision_tower.*            CLIP or SigLIP, without the `vision_model.` of its own files
    model.multi_modal_projector.linear_1 ... linear_N
    model.image_newline             anyres only: a learned vector that ends each row of patches
    model.language_model.*          the language model without its head (`layers.0...`, `norm`)
    lm_head.weight

The projector's linear layers are numbered from 1 for every type: `linear` has only `linear_1`,
`mlpNx_gelu` has `linear_1` to `linear_N`, `identity` has none. N = 2 is transformers' own
projector; every other N is `llava_ray.model.modeling.Projector`.

Two checkpoint formats:
    hf      transformers', as llava-hf publishes it and vLLM reads it: `language_model.model.*`,
            `language_model.lm_head.*`, `vision_tower.vision_model.*`, `multi_modal_projector.*`,
            `image_newline`. The names that later versions of transformers save are read too.
    llava   LLaVA's own: the language model's names unchanged, and beside them
            `model.mm_projector.*`, `model.vision_tower.vision_tower.*`, `model.image_newline`.
            For MPT the first component is `transformer` instead of `model`.
"""

import re
from collections.abc import Iterable
from typing import Literal

CheckpointFormat = Literal["hf", "llava"]

_TRUNKS = {"mpt": "transformer", "gpt_neox": "gpt_neox"}
_HEADS = {"gpt_neox": "embed_out"}
"""Prefixes of a causal language model's trunk and head where they are not `model` and `lm_head`."""

_TRUNK = r"(?:model|transformer|gpt_neox)"
_READ_LLAVA = [
    (
        rf"{_TRUNK}\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)",
        r"model.vision_tower.\1",
    ),
    (rf"{_TRUNK}\.image_newline", "model.image_newline"),
    (r"(?:lm_head|embed_out)\.(.+)", r"lm_head.\1"),
    (rf"{_TRUNK}\.(?!mm_projector\.)(.+)", r"model.language_model.\1"),
]
_READ_HF = [
    (r"(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"model.multi_modal_projector.\1"),
    (r"(?:model\.)?image_newline", "model.image_newline"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"model\.language_model\.(?:model\.)?(.+)", r"model.language_model.\1"),
]
_WRITE_HF = [
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.image_newline", "image_newline"),
]
_PROJECTOR = re.compile(rf"(?:{_TRUNK}\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
_LINEAR = re.compile(r"model\.multi_modal_projector\.linear_(\d+)\.(.+)")
_RECOMPUTED = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Buffers in old files that are recomputed from the configuration."""


def count_projector_layers(projector: str) -> int:
    """Return how many linear layers a projector has.

    Args:
        projector: `mm_projector_type`: "linear", "mlpNx_gelu" or "identity".

    Raises:
        ValueError: the type is not known.
    """
    if projector in ("linear", "identity"):
        return int(projector == "linear")
    if (match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector)) is None:
        raise ValueError(f"unknown projector type {projector!r}: linear, mlpNx_gelu or identity")
    return int(match[1])


def detect_format(names: Iterable[str]) -> CheckpointFormat:
    """Return the checkpoint format that tensor names follow.

    A plain language model counts as "llava", which leaves its names unchanged.
    """
    hf_only = re.compile(r"(model\.)?(language_model|multi_modal_projector)\.|vision_tower\.")
    return "hf" if any(hf_only.match(name) for name in names) else "llava"


def to_memory(name: str, file_format: CheckpointFormat) -> str | None:
    """Return the name in memory of a stored tensor, or None for a buffer that is recomputed.

    What belongs to none of language model, vision tower and projector keeps its name.
    """
    if _RECOMPUTED.fullmatch(name):
        return None
    if file_format == "llava" and (match := _PROJECTOR.fullmatch(name)):
        number = int(match[1] or 0) // 2 + 1  # every other module is the activation
        return f"model.multi_modal_projector.linear_{number}.{match[2]}"
    for pattern, target in _READ_LLAVA if file_format == "llava" else _READ_HF:
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    return name


def tower_to_memory(name: str) -> str | None:
    """Return the name in memory of a tensor from a vision tower's own folder.

    Accepts `CLIPVisionModel`, `SiglipVisionModel` and the whole `CLIPModel`; returns None for the
    tensors of the text half, which are not used.
    """
    if _RECOMPUTED.fullmatch(name) or name.startswith(("text_model.", "text_projection.")):
        return None
    if name in ("logit_scale", "logit_bias", "visual_projection.weight"):
        return None
    return "model.vision_tower." + name.removeprefix("vision_model.")


def from_memory(
    name: str,
    file_format: CheckpointFormat,
    *,
    text_model_type: str = "llama",
    projector: str = "mlp2x_gelu",
) -> str:
    """Return the name of a tensor in a file: the inverse of `to_memory`.

    Args:
        name: a name from the model's `state_dict()`.
        file_format: the format of the file.
        text_model_type: the language model's `model_type`; LLaVA's format keeps its names.
        projector: `mm_projector_type`; in LLaVA's format the layer of "linear" has no number.

    Raises:
        ValueError: the name belongs to no part of a LLaVA.
    """
    if file_format == "hf":
        for ours, theirs in _WRITE_HF:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        raise ValueError(f"{name!r} is not the name of a tensor of a LLaVA in memory")
    trunk = _TRUNKS.get(text_model_type, "model")
    if match := _LINEAR.fullmatch(name):
        number = "" if projector == "linear" else f"{2 * (int(match[1]) - 1)}."
        return f"{trunk}.mm_projector.{number}{match[2]}"
    for ours, theirs in (
        ("model.vision_tower.", f"{trunk}.vision_tower.vision_tower.vision_model."),
        ("model.language_model.", f"{trunk}."),
        ("lm_head.", f"{_HEADS.get(text_model_type, 'lm_head')}."),
        ("model.image_newline", f"{trunk}.image_newline"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name!r} is not the name of a tensor of a LLaVA in memory")
