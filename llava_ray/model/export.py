"""Writes any checkpoint that loads in a form that others read, whole and with everything merged.

Behind `llava-ray export`. What is written is what `load_model` gives: adapters and deltas are in
the weights, a projector is over its base.

    hf          the published layout: transformers, vLLM, SGLang with --model-impl transformers
    vllm        the same folder, after a look at what vLLM's LLaVA leaves out
    original    LLaVA's own layout: its code, and SGLang's native class
    projector   `mm_projector.bin` alone, over a language model
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint import PROCESSOR_FILES, Checkpoint, inspect_checkpoint
from llava_ray.model.core import Core, load_model
from llava_ray.model.pieces import join_pieces
from llava_ray.model.processing import START_END
from llava_ray.model.staging import MAX_SHARD_SIZE, parse_size, write_folder
from llava_ray.model.to_original import find_tokenizer_files, write_original, write_projector
from llava_ray.model.to_published import write_published
from llava_ray.model.weights import Stored, open_parts

Form = Literal["hf", "vllm", "original", "projector"]

FORMS = ("hf", "vllm", "original", "projector")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NOT_IN_VLLM = ("mpt", "gpt_neox")


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
        dtype: "float32", "bfloat16" or "float16"; by default what most weights are stored in.
        max_shard_size: of a weight file, "5GB" or a number of bytes.
        tower_name: of forms original and projector: what config.json is to call the vision tower
            (a hub name); by default the tower is written into the folder.
        overwrite: replace the checkpoint that `out` holds.

    Raises:
        ConfigError: the checkpoint does not load, the form cannot express it, or `out` cannot be
            written; nothing is left there then.
        MissingPackageError: an adapter needs peft.
    """
    checkpoint = inspect_checkpoint(path, base=base, vision_tower=vision_tower)
    form = to or ("hf" if checkpoint.layout == "published" else "original")
    if form not in FORMS:
        raise ConfigError(f"there is no form {form!r}: use one of {', '.join(FORMS)}")
    if tower_name and form not in ("original", "projector"):
        raise ConfigError(
            f"--tower-name {tower_name!r} is for --to original and --to projector; a folder of the "
            f"form {form} has its tower in it: leave --tower-name away"
        )
    parse_size(max_shard_size)
    stored = open_parts(checkpoint.parts)
    precision = dtype or _find_dtype(stored)
    size = sum(t.num_elements for t in stored.values()) * _BYTES.get(precision, 4)
    sources = (checkpoint.folder, checkpoint.base, checkpoint.tower_folder)
    num_bytes = 0 if form == "projector" else size
    with write_folder(out, overwrite=overwrite, sources=sources, num_bytes=num_bytes) as scratch:
        core = load_model(
            path, base=base, vision_tower=vision_tower, dtype=precision, device="cpu"
        )
        extra = _describe_template(core)
        if form in ("original", "projector"):
            write = write_projector if form == "projector" else write_original
            shards = {} if form == "projector" else {"max_shard_size": max_shard_size}
            write(
                scratch,
                core.model,
                core.processor,
                checkpoint,
                place=Path(out).expanduser().resolve(),
                tower_name=tower_name,
                **shards,
                **extra,
            )
        else:
            _write_published(scratch, core, form, max_shard_size, extra)
    return Path(out)


def _write_published(
    folder: Path, core: Core, form: Form, max_shard_size: str | int, extra: Mapping[str, Any]
) -> None:
    checkpoint = core.checkpoint
    if form == "vllm":
        _check_vllm(checkpoint)
    files: list[Path] = []
    if checkpoint.layout == "published":
        files = _find_processor_files(checkpoint)
    else:
        core.processor.tokenizer = join_pieces(core.tokenizer)
        core.processor.chat_template = write_chat_template(core)
    if checkpoint.uses_start_end:
        extra = {**extra, "mm_use_im_start_end": True}
    write_published(
        folder, core.model, core.processor, files=files, max_shard_size=max_shard_size, **extra
    )


def write_chat_template(core: Core) -> str:
    """Return the Jinja source that gives a conversation the text that this package gives it.

    It writes the beginning of sequence, which servers do not add to what a template wrote, and the
    marks around a picture.
    """
    source = core.processor.chat_template or getattr(core.template, "source", "")
    begins = core.tokenizer("").input_ids[:1] == [core.tokenizer.bos_token_id]
    if begins and "bos_token" not in source and core.tokenizer.bos_token not in source:
        source = "{{ bos_token }}" + source
    if core.checkpoint.uses_start_end and START_END[0] not in source:
        image = core.processor.image_token
        source = source.replace(image, START_END[0] + image + START_END[1])
    return source


def _describe_template(core: Core) -> dict[str, str]:
    """Return the field of config.json that names a conversation template, where one is named."""
    name = getattr(core.template, "name", None) or core.checkpoint.template
    return {"llava_ray_template": name} if name else {}


def _check_vllm(checkpoint: Checkpoint) -> None:
    if checkpoint.projector in ("linear", "identity", "mlp1x_gelu"):
        raise ConfigError(
            f"vLLM's LLaVA has a projector of two layers with an activation between, and this one "
            f"is {checkpoint.projector}: use --to hf and SGLang or transformers"
        )
    if checkpoint.text_model_type in _NOT_IN_VLLM:
        raise ConfigError(
            f"vLLM's LLaVA takes no language model of the kind {checkpoint.text_model_type!r}: "
            "use --to hf and transformers"
        )


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
