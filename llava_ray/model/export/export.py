"""Writes any checkpoint that loads in a form that others read, whole and with everything merged.

Behind `llava-ray export`. What is written is what `load_model` gives: adapters and deltas are in
the weights, a projector is over its base.

    hf          the published layout: transformers, vLLM, SGLang with --model-impl transformers
    vllm        the same folder; only where the projector has no activation, config.json says so in
                vLLM's words, which transformers does not know
    original    LLaVA's own layout: its code, and SGLang's native class
    projector   `mm_projector.bin` alone, over a language model
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from llava_ray.errors import ConfigError
from llava_ray.model.architecture import IDENTITY
from llava_ray.model.checkpoint.inspect import PROCESSOR_FILES, Checkpoint
from llava_ray.model.checkpoint.weights import Stored
from llava_ray.model.choose_template import OWN
from llava_ray.model.export.atomic_folder import MAX_SHARD_SIZE, parse_size, write_folder
from llava_ray.model.export.chat_template import add_beginning
from llava_ray.model.export.hf_writer import check_published, write_published
from llava_ray.model.export.llava_writer import (
    check_original_form,
    find_tokenizer_files,
    write_original,
    write_projector,
)
from llava_ray.model.export.piecewise_tokenizer import agrees, join_pieces
from llava_ray.model.loading import Core, load_opened
from llava_ray.model.open_checkpoint import open_checkpoint

Form = Literal["hf", "vllm", "original", "projector"]

FORMS = ("hf", "vllm", "original", "projector")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def export_model(
    path: str | Path,
    out: str | Path,
    *,
    to: Form | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    tower_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in another form; return its folder.

    Args:
        path: as of `load_model`, as are `base` and `vision_tower`.
        out: the folder to write.
        to: see above; by default the layout that the checkpoint has, so that it is written anew,
            whole, in shards and under today's names.
        dtype: "float32", "bfloat16" or "float16"; by default every weight keeps its own, as towers
            have that are kept beside a checkpoint.
        max_shard_size: of a weight file, "5GB" or a number of bytes.
        tower_name: of forms original and projector: what config.json is to call the vision tower
            (a hub name); by default the tower is written into the folder.
        overwrite: replace the checkpoint that `out` holds.

    Raises:
        ConfigError: the checkpoint does not load, the form cannot express it, or `out` cannot be
            written; nothing is left there then.
        MissingPackageError: an adapter needs peft.
    """
    opened = open_checkpoint(path, base=base, vision_tower=vision_tower)
    checkpoint = opened.checkpoint
    form = to or ("hf" if checkpoint.layout == "published" else "original")
    _check_form(checkpoint, form, tower_name)
    stored = opened.stored
    precision = dtype or _find_dtype(stored)
    num_bytes = sum(t.num_elements for t in stored.values()) * _BYTES.get(precision, 4)
    with write_folder(
        out,
        overwrite=overwrite,
        sources=(checkpoint.folder, checkpoint.base, checkpoint.tower_folder),
        num_bytes=0 if form == "projector" else num_bytes,
    ) as scratch:
        core = load_opened(opened, dtype=precision, device="cpu")
        if dtype is None:
            _keep_precision(core.model, stored)
        ends = sorted(core.eos_token_ids)
        core.model.generation_config.eos_token_id = ends if len(ends) > 1 else (ends or [None])[0]
        place = Path(out).expanduser().resolve()
        write_core(
            scratch,
            core,
            form,
            place=place,
            max_shard_size=max_shard_size,
            tower_name=tower_name,
        )
    return Path(out)


def write_core(
    folder: Path,
    core: Core,
    form: str,
    *,
    place: Path | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    tower_name: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write a model in memory into an empty folder.

    Args:
        folder: where to.
        core: the model, not quantized, with what belongs to it.
        form: one of `FORMS`.
        place: where the folder will lie in the end; default: where it is.
        max_shard_size: of a weight file.
        tower_name: as of `export_model`.
        fields: further ones of config.json.
    """
    limit = parse_size(max_shard_size)
    named = {**_name_template(core), **(fields or {})}
    if form in ("hf", "vllm"):
        _write_published(folder, core, form, limit, named)
    else:
        place = place or folder
        _write_original(folder, core, form, limit, named, place=place, tower_name=tower_name)


def _check_form(checkpoint: Checkpoint, form: str, tower_name: str | None) -> None:
    """Raise if a form cannot express a checkpoint, before anything large is read."""
    text = checkpoint.text_model_type
    if form not in FORMS:
        raise ConfigError(f"there is no form {form!r}: use one of {', '.join(FORMS)}")
    if form in ("original", "projector"):
        check_original_form(
            checkpoint.model_type,
            text,
            select_layer=checkpoint.config.get("vision_feature_layer", -2),
        )
        return
    if tower_name:
        raise ConfigError(
            f"--tower-name {tower_name!r} is for --to original and --to projector; a folder of the "
            f"form {form} has its tower in it: leave --tower-name away"
        )
    check_published(
        checkpoint.model_type,
        text,
        projector=checkpoint.projector,
        merge_type=checkpoint.merge_type,
    )
    if form == "vllm" and text == "gpt_neox":
        raise ConfigError("vLLM's LLaVA takes no GPT-NeoX as language model: use --to hf")


def _keep_precision(model: Any, stored: Mapping[str, Stored]) -> None:
    """Put weights that were stored otherwise than most back into a model as they were.

    Not those that an adapter has changed.
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


def _write_published(
    folder: Path, core: Core, form: str, max_shard_size: int, fields: dict[str, Any]
) -> None:
    checkpoint = core.checkpoint
    files: list[Path] = []
    if checkpoint.layout == "published":
        files = _find_processor_files(checkpoint)
    else:
        if checkpoint.in_pieces:
            core.processor.tokenizer = join_pieces(core.tokenizer)
        core.processor.chat_template = add_beginning(core.template.source, core.tokenizer)
    if checkpoint.uses_start_end:
        fields["mm_use_im_start_end"] = True
    activation = core.model.config.projector_hidden_act
    if form == "vllm" and (checkpoint.projector != "mlp2x_gelu" or activation == "linear"):
        fields["projector_hidden_act"] = IDENTITY
    write_published(
        folder,
        core.model,
        core.processor,
        files=files,
        max_shard_size=max_shard_size,
        fields=fields,
    )


def _write_original(
    folder: Path,
    core: Core,
    form: str,
    max_shard_size: int,
    fields: dict[str, Any],
    *,
    place: Path,
    tower_name: str | None,
) -> None:
    parts = (folder, core.model, core.processor, core.checkpoint)
    if not (core.checkpoint.in_pieces or agrees(core.tokenizer, core.tokenizer)):
        fields["llava_ray_whole_prompts"] = True
    if form == "projector":
        write_projector(*parts, place=place, tower_name=tower_name, fields=fields)
    else:
        write_original(
            *parts,
            place=place,
            tower_name=tower_name,
            max_shard_size=max_shard_size,
            fields=fields,
        )


def _name_template(core: Core) -> dict[str, Any]:
    """Return the field of config.json that names a conversation template, where one is named."""
    return {} if core.template.name == OWN else {"llava_ray_template": core.template.name}


def _find_processor_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of tokenizer and processor of a published checkpoint, to be copied."""
    folder = checkpoint.parts[0].files[0].parent
    names = (*PROCESSOR_FILES, "chat_template.jinja", "chat_template.json")
    files = {name: folder / name for name in names if (folder / name).is_file()}
    for file in find_tokenizer_files(checkpoint.tokenizer_folder):
        files[file.name] = file
    return list(files.values())


def _find_dtype(stored: Mapping[str, Stored]) -> str:
    counts: Counter[str] = Counter()
    for tensor in stored.values():
        counts[tensor.dtype] += tensor.num_elements
    most = max(counts, key=counts.__getitem__, default="F32")
    return _DTYPES.get(most, "float32")
