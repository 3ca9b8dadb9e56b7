"""Writes a model in memory in transformers' format, which transformers, vLLM and SGLang read.

The last step of `export --to hf` and of `build`. Tensors have llava-hf's names (see
`tensor_names`), because vLLM refuses the ones that transformers itself saves. What the format
cannot express is rewritten if that changes no result:

    an image token outside the vocabulary   rows are added, up to a multiple of 64, as in llava-hf
    a projector of one linear layer         two layers, the second an identity
    no projector                            two identity layers
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.tensor_names import count_projector_layers, from_memory
from llava_ray.model.export.atomic_folder import MAX_SHARD_SIZE, write_json, write_shards
from llava_ray.model.export.projector import PREFIX, get_projector, pad_projector
from llava_ray.model.modeling import EMBEDDINGS

ROWS = 64
"""Vocabularies grow to a multiple of this, for matrix kernels and tensor parallelism."""

_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}
_COUNTING = (
    "image_token",
    "patch_size",
    "num_additional_image_tokens",
    "num_image_tokens",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
)
"""The settings from which a processor computes the number of an image's tokens."""
_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}


def check_hf_format(
    model_type: str, text_model_type: str, *, projector: str, merge_type: str
) -> None:
    """Check that transformers' own classes can express a model.

    Args:
        model_type: the LLaVA's ("llava", "llava_next", "llava_onevision").
        text_model_type: the language model's.
        projector: the projector's type, as LLaVA names it.
        merge_type: how the tiles of anyres are joined.

    Raises:
        ConfigError: they cannot; the message says which part they do not support.
    """
    if count_projector_layers(projector) > 2:
        raise ConfigError(
            f"transformers' LLaVA has a projector of two layers, and this one is {projector}: use "
            "--to original"
        )
    if text_model_type == "mpt":
        raise ConfigError(
            "transformers' LLaVA does not support MPT as its language model: use --to original"
        )
    if model_type == "llava" and merge_type == "spatial_unpad":
        raise ConfigError(
            "transformers' LLaVA puts no newline behind an image, and this checkpoint does "
            "(mm_patch_merge_type=spatial_unpad without anyres): use --to original"
        )
    if model_type == "llava_next" and merge_type != "spatial_unpad":
        raise ConfigError(
            f"transformers' LLaVA-NeXT joins tiles by spatial_unpad, and this checkpoint by "
            f"{merge_type} (mm_patch_merge_type): use --to original"
        )


def write_hf(
    folder: Path,
    model: Any,
    processor: Any,
    *,
    files: Sequence[Path] = (),
    max_shard_size: str | int = MAX_SHARD_SIZE,
    fields: Mapping[str, Any],
) -> None:
    """Write weights, config, processor, tokenizer and chat template.

    Args:
        folder: an empty one.
        model: transformers' or ours, not quantized, in the precision to write.
        processor: transformers', with its chat template.
        files: the processor's files, if they are in this format already; they are copied.
        max_shard_size: maximum size of a weight file.
        fields: more fields for config.json.
    """
    config = model.config
    rows = count_rows(config, processor.tokenizer)
    write_shards(folder, _name_tensors(model, rows), max_shard_size=max_shard_size)
    described = json.loads(config.to_json_string(use_diff=True))
    described = {n: v for n, v in described.items() if not n.startswith(("mm_", "_name"))}
    described["text_config"].pop("_name_or_path", None)
    described["text_config"]["vocab_size"] = rows
    if get_projector(config) != "mlp2x_gelu":
        described["projector_hidden_act"] = "linear"
    kind = config.model_type
    write_json(folder / "config.json", {"architectures": [_CLASSES[kind]], **described, **fields})
    write_generation(folder, model, processor.tokenizer)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if files:
        _complete_processor(folder, processor, kind)
    else:
        _write_processor(folder, processor)


def count_rows(config: Any, tokenizer: Any) -> int:
    """Return how many rows embeddings and head need for all tokens."""
    rows = config.text_config.vocab_size
    needed = max(config.image_token_id + 1, len(tokenizer))
    return rows if needed <= rows else -(-needed // ROWS) * ROWS


def add_rows(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return a matrix with rows added, each the mean of its rows.

    In the head, such a row's logit is the mean of all logits, so it is never the largest.
    """
    if num_rows <= weight.shape[0]:
        return weight
    mean = weight.detach().float().mean(0).to(weight.dtype)
    return torch.cat([weight.detach(), mean.expand(num_rows - weight.shape[0], -1)])


def write_generation(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write generation_config.json, which has the tokens that end an answer."""
    described = json.loads(model.generation_config.to_json_string(use_diff=True))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if described.get(name) is None and getattr(tokenizer, name) is not None:
            described[name] = getattr(tokenizer, name)
    described.pop("_from_model_config", None)
    write_json(folder / "generation_config.json", described)


def _name_tensors(model: Any, rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    projector = get_projector(config)
    embeddings = EMBEDDINGS.get(config.text_config.model_type, "embed_tokens")
    with_rows = {f"model.language_model.{embeddings}.weight", "lm_head.weight"}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.startswith(PREFIX) and projector != "mlp2x_gelu":
            continue
        whole = add_rows(tensor, rows) if name in with_rows else tensor
        yield from_memory(name, "hf"), whole
    if projector != "mlp2x_gelu":
        for name, tensor in pad_projector(model, projector).items():
            yield f"multi_modal_projector.{name}", tensor


def _complete_processor(folder: Path, processor: Any, kind: str) -> None:
    """Complete processor_config.json with the settings that determine an image's token count.

    Older files lack some of them, and transformers then computes a count that differs from the
    model's.
    """
    file = folder / "processor_config.json"
    described = json.loads(file.read_text()) if file.exists() else {}
    settings = {"processor_class": _PROCESSORS[kind], **described}
    settings |= {n: v for n in _COUNTING if (v := getattr(processor, n, None)) is not None}
    if settings != described:
        write_json(file, settings)


def _write_processor(folder: Path, processor: Any) -> None:
    """Write the processor, and preprocessor_config.json for software that reads only that."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    images = processor.image_processor
    settings = images.to_dict()
    if type(images).__name__.startswith("LlavaImageProcessor") and not settings.get("do_pad"):
        kind = CLIPImageProcessorPil if settings.get("do_center_crop") else SiglipImageProcessorPil
        processor.image_processor = kind(
            **{n: v for n, v in settings.items() if n not in ("do_pad", "image_processor_type")}
        )
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # generation from a batch of prompts needs it
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    described = json.loads(file.read_text())
    if (
        described.get("tokenizer_class") == "TokenizersBackend"
    ):  # a name that older versions do not know
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only", "chat_template"):  # the last has its own file
        described.pop(name, None)
    write_json(file, described)
