"""Writes any checkpoint that loads in a format that other software reads, with everything merged.

Behind `llava-ray export`. What is written is what `load_model` gives: adapters and deltas are
merged into the weights, a projector is joined with its base.

    hf          transformers' format: for transformers, vLLM, SGLang with --model-impl transformers
    vllm        the same; but if the projector has no activation, config.json names that as vLLM
                does, which transformers does not understand
    original    LLaVA's own format: for its code, and SGLang's native class
    projector   only `mm_projector.bin`, to be loaded over a language model
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from llava_ray.errors import ConfigError
from llava_ray.model.architecture import IDENTITY
from llava_ray.model.checkpoint.inspect import PROCESSOR_FILES, Checkpoint
from llava_ray.model.checkpoint.weights import StoredTensor
from llava_ray.model.choose_template import OWN
from llava_ray.model.export.atomic_folder import MAX_SHARD_SIZE, parse_size, write_folder
from llava_ray.model.export.chat_template import add_beginning
from llava_ray.model.export.hf_writer import check_hf_format, write_hf
from llava_ray.model.export.llava_writer import (
    check_llava_format,
    find_tokenizer_files,
    write_llava,
    write_projector,
)
from llava_ray.model.export.piecewise_tokenizer import agrees, join_pieces
from llava_ray.model.loading import LoadedModel, load_opened
from llava_ray.model.open_checkpoint import open_checkpoint

ExportFormat = Literal["hf", "vllm", "original", "projector"]

EXPORT_FORMATS = ("hf", "vllm", "original", "projector")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def export_model(
    path: str | Path,
    out: str | Path,
    *,
    to: ExportFormat | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    template: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    tower_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in another format; return its folder.

    Args:
        path, base, vision_tower, template: as in `load_model`.
        out: the folder to write.
        to: see above; by default the checkpoint's own format, so that it is rewritten with
            everything merged, in shards and under current names.
        dtype: "float32", "bfloat16" or "float16"; by default every weight keeps its own, which may
            differ between vision tower and language model.
        max_shard_size: maximum size of a weight file, "5GB" or a number of bytes.
        tower_name: for original and projector: the vision tower's name in config.json (a
            hub name); by default the tower is written into the folder.
        overwrite: replace the checkpoint in `out`.

    Raises:
        ConfigError: the checkpoint does not load, the format cannot express it, or `out` cannot be
            written; nothing is left in `out` then.
        MissingPackageError: an adapter needs peft.
    """
    opened = open_checkpoint(path, base=base, vision_tower=vision_tower, template=template)
    checkpoint = opened.checkpoint
    export_format = to or ("hf" if checkpoint.format == "hf" else "original")
    _check_format(checkpoint, export_format, tower_name)
    stored = opened.stored
    precision = dtype or _find_dtype(stored)
    num_bytes = sum(t.num_elements for t in stored.values()) * _BYTES.get(precision, 4)
    with write_folder(
        out,
        overwrite=overwrite,
        sources=(checkpoint.folder, checkpoint.base, checkpoint.tower_folder),
        num_bytes=0 if export_format == "projector" else num_bytes,
    ) as scratch:
        loaded = load_opened(opened, dtype=precision, device="cpu")
        if dtype is None:
            _keep_precision(loaded.model, stored)
        ends = sorted(loaded.eos_token_ids)
        loaded.model.generation_config.eos_token_id = ends if len(ends) > 1 else (ends or [None])[0]
        place = Path(out).expanduser().resolve()
        write_model(
            scratch,
            loaded,
            export_format,
            place=place,
            max_shard_size=max_shard_size,
            tower_name=tower_name,
        )
    return Path(out)


def write_model(
    folder: Path,
    loaded: LoadedModel,
    export_format: str,
    *,
    place: Path | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    tower_name: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write a model in memory into an empty folder.

    Args:
        folder: the folder.
        loaded: the model, not quantized.
        export_format: one of `EXPORT_FORMATS`.
        place: the folder's final path; default: `folder`.
        max_shard_size: maximum size of a weight file.
        tower_name: as in `export_model`.
        fields: more fields for config.json.
    """
    limit = parse_size(max_shard_size)
    named = {**_name_template(loaded), **(fields or {})}
    if export_format in ("hf", "vllm"):
        _write_hf_format(folder, loaded, export_format, limit, named)
    else:
        place = place or folder
        _write_llava_format(
            folder, loaded, export_format, limit, named, place=place, tower_name=tower_name
        )


def _check_format(checkpoint: Checkpoint, export_format: str, tower_name: str | None) -> None:
    """Raise if a format cannot express a checkpoint, before any weights are read."""
    text = checkpoint.text_model_type
    if export_format not in EXPORT_FORMATS:
        raise ConfigError(
            f"there is no format {export_format!r}: use one of {', '.join(EXPORT_FORMATS)}"
        )
    if export_format in ("original", "projector"):
        check_llava_format(
            checkpoint.model_type,
            text,
            select_layer=checkpoint.config.get("vision_feature_layer", -2),
        )
        return
    if tower_name:
        raise ConfigError(
            f"--tower-name {tower_name!r} is only for --to original and --to projector; a folder "
            f"of the format {export_format} contains its tower: leave --tower-name out"
        )
    check_hf_format(
        checkpoint.model_type,
        text,
        projector=checkpoint.projector,
        merge_type=checkpoint.merge_type,
    )
    if export_format == "vllm" and text == "gpt_neox":
        raise ConfigError(
            "vLLM's LLaVA does not support GPT-NeoX as its language model: use --to hf"
        )


def _keep_precision(model: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Restore the weights whose stored dtype differs from the model's, in their own dtype.

    Weights that an adapter has changed are left as they are.
    """
    for name, parameter in list(model.named_parameters()):
        tensor = stored.get(name)
        if tensor is None or tensor.dtype not in _DTYPES:
            continue
        if getattr(torch, _DTYPES[tensor.dtype]) == parameter.dtype:
            continue
        exact = tensor[...]
        if torch.equal(exact.to(parameter.dtype), parameter):
            place, _, last = name.rpartition(".")
            setattr(
                model.get_submodule(place), last, torch.nn.Parameter(exact, requires_grad=False)
            )


def _write_hf_format(
    folder: Path,
    loaded: LoadedModel,
    export_format: str,
    max_shard_size: int,
    fields: dict[str, Any],
) -> None:
    checkpoint = loaded.checkpoint
    files: list[Path] = []
    if checkpoint.format == "hf":
        files = _find_processor_files(checkpoint)
    else:
        if checkpoint.in_pieces:
            loaded.processor.tokenizer = join_pieces(loaded.tokenizer)
        loaded.processor.chat_template = add_beginning(loaded.template.source, loaded.tokenizer)
    if checkpoint.uses_start_end:
        fields["mm_use_im_start_end"] = True
    activation = loaded.model.config.projector_hidden_act
    if export_format == "vllm" and (checkpoint.projector != "mlp2x_gelu" or activation == "linear"):
        fields["projector_hidden_act"] = IDENTITY
    write_hf(
        folder,
        loaded.model,
        loaded.processor,
        files=files,
        max_shard_size=max_shard_size,
        fields=fields,
    )


def _write_llava_format(
    folder: Path,
    loaded: LoadedModel,
    export_format: str,
    max_shard_size: int,
    fields: dict[str, Any],
    *,
    place: Path,
    tower_name: str | None,
) -> None:
    parts = (folder, loaded.model, loaded.processor, loaded.checkpoint)
    if not (loaded.checkpoint.in_pieces or agrees(loaded.tokenizer, loaded.tokenizer)):
        fields["llava_ray_whole_prompts"] = True
    if export_format == "projector":
        write_projector(*parts, place=place, tower_name=tower_name, fields=fields)
    else:
        write_llava(
            *parts,
            place=place,
            tower_name=tower_name,
            max_shard_size=max_shard_size,
            fields=fields,
        )


def _name_template(loaded: LoadedModel) -> dict[str, Any]:
    """Return the field of config.json with the template's name, if it has one."""
    return {} if loaded.template.name == OWN else {"llava_ray_template": loaded.template.name}


def _find_processor_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the tokenizer and processor files of a checkpoint in transformers' format."""
    folder = checkpoint.weights[0].files[0].parent
    names = (*PROCESSOR_FILES, "chat_template.jinja", "chat_template.json")
    files = {name: folder / name for name in names if (folder / name).is_file()}
    for file in find_tokenizer_files(checkpoint.tokenizer_folder):
        files[file.name] = file
    return list(files.values())


def _find_dtype(stored: Mapping[str, StoredTensor]) -> str:
    counts: Counter[str] = Counter()
    for tensor in stored.values():
        counts[tensor.dtype] += tensor.num_elements
    most = max(counts, key=counts.__getitem__, default="F32")
    return _DTYPES.get(most, "float32")
