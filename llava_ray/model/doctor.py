"""Describes a checkpoint and finds what is wrong with it, without reading weights.

Behind `llava-ray doctor`. It follows `load_model` up to the point where weights would be read, and
turns each error into a line that says how to fix it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError, UserError
from llava_ray.model.adapter_files import check_effect, open_adapter
from llava_ray.model.architecture import Architecture, check_weights, find_unmarked
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.checkpoint.locate import find_folder
from llava_ray.model.checkpoint.quantized import find_leftover
from llava_ray.model.checkpoint.weights import StoredTensor
from llava_ray.model.choose_template import OWN
from llava_ray.model.open_checkpoint import (
    OpenedCheckpoint,
    open_checkpoint,
    read_context_length,
)
from llava_ray.model.processor_check import find_misfit

_KINDS = {
    "full": "a LLaVA with all its weights",
    "projector": "a projector over a language model",
    "lora": "a LoRA of LLaVA's trainer over a base",
    "adapter": "a PEFT adapter over a LLaVA",
    "delta": "a delta over a language model",
}
_FORMATS = {"hf": "transformers' (llava-hf)", "llava": "LLaVA's own (liuhaotian)"}
_PRECISIONS = {"float32": 4.0, "bfloat16 or float16": 2.0}
_QUANTIZED = {"8bit": 1.0, "4bit": 0.53}
"""Bytes of a quantized weight, scales included; only the language model's layers are quantized."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`.

    Attributes:
        facts: what the checkpoint is, in the order of printing.
        problems: what keeps it from loading, each with how to fix it.
    """

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return facts and problems as lines for a terminal."""
        width = max((len(name) for name in self.facts), default=0)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "no problems found"])


def diagnose(
    path: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    template: str | None = None,
) -> Diagnosis:
    """Return what a checkpoint is and what is wrong with it. No weights are read.

    Args:
        path, base, vision_tower, template: as in `load_model`.
    """
    found = Diagnosis()
    try:
        folder = find_folder(path)
        found.facts["folder"] = str(folder)
        opened = open_checkpoint(path, base=base, vision_tower=vision_tower, template=template)
    except UserError as error:
        found.problems.append(error.message)
        return found
    checkpoint = opened.checkpoint
    found.facts.update(_describe_files(checkpoint))
    image_token_id, tokenizer = _add_processor(found, opened)
    try:
        stored, architecture = opened.stored, opened.describe_model(image_token_id)
    except UserError as error:
        found.problems.append(error.message)
        return found
    if method := find_leftover(checkpoint):
        found.facts["quantization"] = f"none; {method} in config.json is left over and ignored"
    found.problems.extend(check_weights(checkpoint, architecture, stored))
    if tokenizer is not None:
        found.problems.extend(find_unmarked(checkpoint, architecture, tokenizer))
        misfit = find_misfit(checkpoint, opened.processor, architecture.config)
        found.problems.extend([misfit] if misfit else [])
    found.facts.update(_describe_sizes(architecture, stored))
    found.problems.extend(_check_adapters(checkpoint, architecture))
    return found


def _describe_files(checkpoint: Checkpoint) -> dict[str, str]:
    facts = {
        "kind": _KINDS[checkpoint.kind],
        "format": _FORMATS[checkpoint.format],
        "model": f"{checkpoint.model_type}, language model {checkpoint.text_model_type}",
        "vision tower": checkpoint.tower or "not named",
        "projector": checkpoint.projector,
        "images": checkpoint.aspect_mode,
    }
    if checkpoint.base:
        facts["base"] = str(checkpoint.base)
    if checkpoint.tower_folder:
        facts["vision tower"] += f", found in {checkpoint.tower_folder}"
    if checkpoint.aspect_mode == "anyres":
        facts["images"] += f", tiles joined {checkpoint.merge_type}"
    elif checkpoint.merge_type == "spatial_unpad":
        facts["images"] += ", each followed by a newline"
    if checkpoint.uses_start_end:
        facts["images"] += ", between <im_start> and <im_end>"
    return facts


def _add_processor(found: Diagnosis, opened: OpenedCheckpoint) -> tuple[int, Any]:
    """Add the facts about tokenizer and template.

    Returns:
        The image token's id, and the tokenizer or None if it does not load.
    """
    try:
        processor, template = opened.processor, opened.template
    except UserError as error:
        found.problems.append(error.message)
        return int(opened.checkpoint.config.get("image_token_index") or 0), None
    tokenizer = processor.tokenizer
    found.facts["tokenizer"] = (
        f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens, image token "
        f"{processor.image_token} = {processor.image_token_id}"
    )
    found.facts["template"] = "the checkpoint's own chat template"
    if template.name != OWN:
        stops = ", ".join(map(repr, template.stop)) or "the end of sequence"
        found.facts["template"] = f"{template.name}; answers end at {stops}"
    return processor.image_token_id, tokenizer


def _describe_sizes(architecture: Architecture, stored: dict[str, StoredTensor]) -> dict[str, str]:
    config = architecture.config
    text, vision = config.text_config, config.vision_config
    counts = {name: math.prod(shape) for name, shape in architecture.shapes.items()}
    if config.tie_word_embeddings:
        counts.pop("lm_head.weight", None)
    total = sum(counts.values())
    linear = sum(
        count
        for name, count in counts.items()
        if name.startswith("model.language_model.")
        and len(architecture.shapes[name]) == 2
        and not any(part in name for part in ("embed", "wte"))
    )
    memory = {name: total * size for name, size in _PRECISIONS.items()}
    memory |= {name: (total - linear) * 2 + linear * size for name, size in _QUANTIZED.items()}
    patches = (vision.image_size // vision.patch_size) ** 2
    dtypes = sorted({tensor.dtype for tensor in stored.values()})
    return {
        "sizes": f"{total / 1e6:,.1f} million weights; language model {text.num_hidden_layers} "
        f"layers of {text.hidden_size}, tower {vision.num_hidden_layers} layers of "
        f"{vision.hidden_size}, {vision.image_size} x {vision.image_size} pixels in {patches} "
        "patches",
        "context": f"{read_context_length(text):,} tokens",
        "stored as": ", ".join(dtypes),
        "memory": ", ".join(f"{name} {_format(size)}" for name, size in memory.items())
        + " for the weights; the engine's KV cache comes on top",
    }


def _check_adapters(checkpoint: Checkpoint, architecture: Architecture) -> list[str]:
    problems = []
    for folder in checkpoint.adapters:
        try:
            is_tied = architecture.config.get_text_config().tie_word_embeddings
            check_effect(folder, open_adapter(folder, architecture.shapes, is_tied=is_tied))
        except ConfigError as error:
            problems.append(error.message)
    return problems


def _format(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
