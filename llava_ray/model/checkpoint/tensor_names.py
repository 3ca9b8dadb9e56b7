"""Names of stored tensors <-> names in memory: the one table of what files call their weights.

Between the readers of files (weights, deltas, adapters), the model and the writers (export).
Pure functions on strings; nothing is opened here.

In memory names are those of transformers 5.19's `LlavaForConditionalGeneration.state_dict()`:

    model.vision_tower.*            CLIP or SigLIP, without the `vision_model.` of its own files
    model.multi_modal_projector.linear_1 ... linear_N
    model.image_newline             anyres with rows that end in a learned vector
    model.language_model.*          the language model without its head (`layers.0...`, `norm`)
    lm_head.weight

The projector's linear layers are numbered from 1 whatever its type: `linear` has `linear_1` alone,
`mlpNx_gelu` has `linear_1` to `linear_N`, `identity` has none. With N = 2 that is transformers' own
projector; with another N it is `llava_ray.model.modeling.Projector`.

Layouts of files:
    published   what llava-hf publishes and vLLM reads: `language_model.model.*`,
                `language_model.lm_head.*`, `vision_tower.vision_model.*`,
                `multi_modal_projector.*`, `image_newline`. Reading also accepts what transformers
                itself has saved since.
    original    LLaVA's own: the language model's names untouched, beside them
                `model.mm_projector.*`, `model.vision_tower.vision_tower.*`,
                `model.image_newline`. The first part is `transformer` for MPT.
"""

import re
from collections.abc import Iterable
from typing import Literal

Layout = Literal["published", "original"]

_TRUNKS = {"mpt": "transformer", "gpt_neox": "gpt_neox"}
_HEADS = {"gpt_neox": "embed_out"}
"""What a causal language model calls its trunk and head; others say `model` and `lm_head`."""

_TRUNK = r"(?:model|transformer|gpt_neox)"
_READ_ORIGINAL = [
    (
        rf"{_TRUNK}\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)",
        r"model.vision_tower.\1",
    ),
    (rf"{_TRUNK}\.image_newline", "model.image_newline"),
    (r"(?:lm_head|embed_out)\.(.+)", r"lm_head.\1"),
    (rf"{_TRUNK}\.(?!mm_projector\.)(.+)", r"model.language_model.\1"),
]
_READ_PUBLISHED = [
    (r"(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"model.multi_modal_projector.\1"),
    (r"(?:model\.)?image_newline", "model.image_newline"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"model\.language_model\.(?:model\.)?(.+)", r"model.language_model.\1"),
]
_WRITE_PUBLISHED = [
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.image_newline", "image_newline"),
]
_PROJECTOR = re.compile(rf"(?:{_TRUNK}\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
_LINEAR = re.compile(r"model\.multi_modal_projector\.linear_(\d+)\.(.+)")
_RECOMPUTED = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Buffers that old files hold and that follow from the configuration."""


def count_projector_layers(projector: str) -> int:
    """Return how many linear layers a projector of the original's type has.

    Args:
        projector: `mm_projector_type`: "linear", "mlpNx_gelu" or "identity".

    Raises:
        ValueError: no such type.
    """
    if projector in ("linear", "identity"):
        return int(projector == "linear")
    if (match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector)) is None:
        raise ValueError(f"unknown projector type {projector!r}: linear, mlpNx_gelu or identity")
    return int(match[1])


def detect_layout(names: Iterable[str]) -> Layout:
    """Return the layout that names of stored tensors follow; "original" if none is telling.

    A plain language model reads as "original", which leaves its names as they are.
    """
    telling = re.compile(r"(model\.)?(language_model|multi_modal_projector)\.|vision_tower\.")
    return "published" if any(telling.match(name) for name in names) else "original"


def to_memory(name: str, layout: Layout) -> str | None:
    """Return the name in memory of a stored tensor, or None if it has no place there.

    Tensors without a place are buffers that are computed anew and, in the original layout, what is
    no part of a language model with a tower and a projector.
    """
    if _RECOMPUTED.fullmatch(name):
        return None
    if layout == "original" and (match := _PROJECTOR.fullmatch(name)):
        number = int(match[1] or 0) // 2 + 1  # every second module is the activation
        return f"model.multi_modal_projector.linear_{number}.{match[2]}"
    for pattern, target in _READ_ORIGINAL if layout == "original" else _READ_PUBLISHED:
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    return None


def tower_to_memory(name: str) -> str | None:
    """Return the name in memory of a tensor from the folder of a vision tower.

    Reads `CLIPVisionModel`, `SiglipVisionModel` and the whole `CLIPModel`, whose text half has no
    place: None.
    """
    if _RECOMPUTED.fullmatch(name) or name.startswith(("text_model.", "text_projection.")):
        return None
    if name in ("logit_scale", "logit_bias", "visual_projection.weight"):
        return None
    return "model.vision_tower." + name.removeprefix("vision_model.")


def from_memory(
    name: str, layout: Layout, *, text_model_type: str = "llama", projector: str = "mlp2x_gelu"
) -> str:
    """Return what a tensor is called in a file: the inverse of `to_memory`.

    Args:
        name: a name from the model's `state_dict()`.
        layout: of the file.
        text_model_type: the language model's `model_type`; the original layout keeps its names.
        projector: the original's type; its one linear layer has no number there.

    Raises:
        ValueError: the name is none of the parts of a LLaVA.
    """
    if layout == "published":
        for ours, published in _WRITE_PUBLISHED:
            if name.startswith(ours):
                return published + name.removeprefix(ours)
        raise ValueError(f"{name!r} is no tensor of a LLaVA in memory")
    trunk = _TRUNKS.get(text_model_type, "model")
    if match := _LINEAR.fullmatch(name):
        number = "" if projector == "linear" else f"{2 * (int(match[1]) - 1)}."
        return f"{trunk}.mm_projector.{number}{match[2]}"
    for ours, original in (
        ("model.vision_tower.", f"{trunk}.vision_tower.vision_tower.vision_model."),
        ("model.language_model.", f"{trunk}."),
        ("lm_head.", f"{_HEADS.get(text_model_type, 'lm_head')}."),
        ("model.image_newline", f"{trunk}.image_newline"),
    ):
        if name.startswith(ours):
            return original + name.removeprefix(ours)
    raise ValueError(f"{name!r} is no tensor of a LLaVA in memory")
