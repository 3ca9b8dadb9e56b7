"""Writes deltas: a trained checkpoint minus the language model that it was trained from.

Behind `llava-ray delta make`. A delta is a checkpoint in LLaVA's own format. It has the difference
for each tensor that the language model has too (for embeddings and heads with added rows, the
difference of the rows that both have), and all other tensors in full. `load_model(delta, base=...)`
and LLaVA's `apply_delta` read it.

Weights are read and written one tensor at a time.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import Checkpoint, inspect_checkpoint, require_files
from llava_ray.model.checkpoint.locate import find_folder
from llava_ray.model.checkpoint.tensor_names import from_memory
from llava_ray.model.checkpoint.weights import StoredTensor, WeightFiles, find_weights, open_weights
from llava_ray.model.export.atomic_folder import (
    MAX_SHARD_SIZE,
    parse_size,
    write_folder,
    write_shards,
)

_GROWN = ("lm_head.weight", "embed_tokens.weight", "wte.weight")


def make_delta(
    path: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    vision_tower: str | Path | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint minus the language model that it was trained from; return the folder.

    Args:
        path: a checkpoint in LLaVA's format, with full weights.
        out: the folder to write.
        base: the language model.
        vision_tower: as in `load_model`.
        max_shard_size: maximum size of a weight file.
        overwrite: replace the checkpoint in `out`.

    Raises:
        ConfigError: the two do not fit together, or `out` cannot be written.
    """
    checkpoint = inspect_checkpoint(path, vision_tower=vision_tower)
    if checkpoint.kind != "full" or checkpoint.format != "llava":
        raise ConfigError(
            f"{str(path)!r} is not a checkpoint with full weights in LLaVA's own format, which a "
            "delta is made from: write one with `llava-ray export PATH OUT --to original`"
        )
    below = find_folder(base)
    weights = find_weights(below)
    require_files(below, "weights", weights)
    stored, subtracted = open_weights(checkpoint.weights[1:]), open_weights([WeightFiles(weights)])
    _check_same_shapes(stored, subtracted, below)
    sources = (checkpoint.folder, below)
    with write_folder(out, overwrite=overwrite, sources=sources) as scratch:
        limit = parse_size(max_shard_size)
        write_shards(scratch, _subtract(checkpoint, stored, subtracted), max_shard_size=limit)
        for file in sorted(checkpoint.folder.iterdir()):
            if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja"):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, scratch / file.name)
            elif (file / "preprocessor_config.json").is_file():  # its vision tower
                shutil.copytree(file, scratch / file.name)
    return Path(out)


def _check_same_shapes(
    stored: Mapping[str, StoredTensor], subtracted: Mapping[str, StoredTensor], base: Path
) -> None:
    if missing := sorted(set(subtracted) - set(stored)):
        raise ConfigError(
            f"the base {str(base)!r} has {len(missing)} tensors that the checkpoint lacks "
            f"({missing[0]}): give the language model that it was trained from"
        )
    for name, tensor in subtracted.items():
        whole = stored[name].shape
        grown = name.endswith(_GROWN) and whole[1:] == tensor.shape[1:] and whole > tensor.shape
        if whole != tensor.shape and not grown:
            raise ConfigError(
                f"{name} is {list(whole)} in {stored[name].file} and {list(tensor.shape)} in the "
                f"base {str(base)!r}: give the language model that it was trained from"
            )


def _subtract(
    checkpoint: Checkpoint,
    stored: Mapping[str, StoredTensor],
    subtracted: Mapping[str, StoredTensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stored.items():
        written = from_memory(
            name,
            "llava",
            text_model_type=checkpoint.text_model_type,
            projector=checkpoint.projector,
        )
        if name not in subtracted:
            yield written, tensor[...]
            continue
        below = subtracted[name][...].float()
        difference = tensor[...].float()
        difference[: len(below)] -= below
        yield written, difference.to(tensor[...].dtype)
