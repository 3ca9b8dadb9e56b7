"""Opens weight files lazily: names, shapes and dtypes now, tensors when they are indexed.

`inspect` says which files make up a model. Here they become one table of lazy tensors under their
names in memory, which `loading` hands to transformers. Only headers are read until then, so a wrong
file is found before anything large is loaded, and no weight is in memory twice.

File formats: safetensors (https://github.com/huggingface/safetensors#format); PyTorch's `.bin`,
which is a pickle and therefore only ever read with `weights_only=True`.
"""

import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.locate import REMEDY, check_pointer, read_json
from llava_ray.model.checkpoint.tensor_names import detect_format, to_memory, tower_to_memory

Role = Literal["weights", "tower", "frozen_tower", "delta"]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

_BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "I64": 64, "I32": 32, "U8": 8, "I8": 8}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "BOOL": 8, "I16": 16}
_TORCH_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LAST_NORM = re.compile(r"(^|\.)(model|transformer)\.norm(_f)?\.weight$")
_DELTA_NORM = 0.1
_WRAPPED = re.compile(r"^base_model\.(model\.)?")
"""The prefix that peft adds to the names of a model it wraps (non_lora_trainables.bin)."""

_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class WeightFiles:
    """Weight files that are applied together.

    Attributes:
        files: all shards.
        role: "weights" (with names of either format), "tower" (from a vision tower's own folder),
            "frozen_tower" (the same, not overwritten by later files), or "delta" (added to the
            weights before it).
    """

    files: tuple[Path, ...]
    role: Role = "weights"


class StoredTensor:
    """A tensor in a file; `stored[...]` reads it.

    Attributes:
        file: the file it is in.
        shape: its shape.
        dtype: its dtype, as safetensors calls it ("F16").
    """

    def __init__(self, file: Path, shape: Sequence[int], dtype: str, source: Any) -> None:
        self.file = file
        self.shape = tuple(shape)
        self.dtype = dtype
        self._source = source

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def get_dtype(self) -> str:
        """Return `dtype`; transformers calls this, as on safetensors' slices."""
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._source[index]


class SummedTensor(StoredTensor):
    """The sum of a base tensor and a delta, computed when it is read, in the delta's dtype.

    The delta of embeddings and heads may have more rows than the base; those are kept unchanged, as
    in LLaVA's `apply_delta`.
    """

    def __init__(self, base: StoredTensor, delta: StoredTensor) -> None:
        super().__init__(delta.file, delta.shape, delta.dtype, None)
        self._base, self._delta = base, delta

    def __getitem__(self, index: Any) -> torch.Tensor:
        base, delta = self._base[...], self._delta[...]
        total = delta.clone()
        total[: base.shape[0]] += base.to(delta.dtype)
        return total[index]


def find_weights(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of a folder, safetensors before PyTorch's; empty if it has none.

    A whole file comes before shards, as in transformers: an index beside it is left over.

    Raises:
        ConfigError: an index names shards that are missing.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map") or {}
            shards = sorted({str(shard) for shard in places.values()})
            if not shards:
                raise ConfigError(f"{index} names no weight files: {REMEDY}")
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ConfigError(
                    f"model {str(folder)!r} lacks {len(missing)} of {len(shards)} weight files "
                    f"({', '.join(missing[:3])}): {REMEDY}"
                )
            return tuple(folder / shard for shard in shards)
    return ()


def open_weights(weights: Sequence[WeightFiles]) -> dict[str, StoredTensor]:
    """Return the tensors of all files under their names in memory; later files override earlier.

    A tensor that belongs to no part of a LLaVA keeps its name, so that `check_weights` finds it.

    Raises:
        ConfigError: a file is damaged, or a delta does not fit its base.
    """
    tensors: dict[str, StoredTensor] = {}
    roles: dict[str, Role] = {}
    for part in weights:
        stored: dict[str, StoredTensor] = {}
        for file in part.files:
            stored |= {_WRAPPED.sub("", n): t for n, t in open_file(file).items()}
        file_format = detect_format(stored)
        for name, tensor in stored.items():
            is_tower = part.role in ("tower", "frozen_tower")
            place = tower_to_memory(name) if is_tower else to_memory(name, file_format)
            if place is None or roles.get(place) == "frozen_tower":
                continue
            if part.role == "delta" and roles.get(place) == "weights":
                _check_delta(name, tensors[place], tensor)
                tensor = SummedTensor(tensors[place], tensor)
            tensors[place], roles[place] = tensor, part.role
    return tensors


def open_file(file: Path) -> dict[str, StoredTensor]:
    """Return a weight file's tensors by their stored names; only its header is read.

    Raises:
        ConfigError: the file is damaged, a Git LFS pointer, or a pickle that contains more than
            tensors.
    """
    check_pointer(file)
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    header = read_header(file)
    try:
        source = safe_open(file, framework="pt")
        return {
            name: StoredTensor(file, entry["shape"], entry["dtype"], source.get_slice(name))
            for name, entry in header.items()
        }
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} does not load: {error}; fetch it again") from error


def read_header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: shape and dtype of each tensor by its name.

    Raises:
        ConfigError: the file is not safetensors, or is shorter or longer than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(size, _MAX_HEADER_BYTES):
            raise ConfigError(
                f"{file} does not load: it is not a safetensors file; download it again"
            )
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} does not load: its header is damaged ({error}); download it again"
            ) from error
    if size != 8 + length + end:
        raise ConfigError(
            f"{file} does not load: it has {size:,} bytes and its header says "
            f"{8 + length + end:,}, so the copy is incomplete; download it again"
        )
    return header


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped into memory
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{file} is a pickle that contains more than tensors, and unpickling it could run "
            "arbitrary code, so it is not loaded; get the weights as safetensors from a source "
            "that you trust"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{file} does not load: {reason[0]}; download it again") from error
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{file} does not contain named tensors: give a weight file of a checkpoint"
        )
    return {
        name: StoredTensor(
            file, tensor.shape, _TORCH_NAMES.get(tensor.dtype, str(tensor.dtype)), tensor
        )
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def check_deltas(weights: Sequence[WeightFiles], text_model_type: str) -> None:
    """Check that a delta is a delta, and that weights without a base are not one.

    Nothing in a file marks a delta. But the scale of a language model's last norm is close to one
    and the difference of two such scales close to zero, and the scale of a full model is closer to
    its base's than to zero. Reads that one tensor of each.

    Raises:
        ConfigError: a delta has no base, or full weights were given one.
    """
    if text_model_type not in ("llama", "mistral", "mpt", "qwen2"):
        return
    *below, part = weights
    if (norm := _find_last_norm(part)) is None:
        return
    scale = norm[...].float()
    base = next((n for part in below if (n := _find_last_norm(part)) is not None), None)
    if part.role != "delta" and float(scale.abs().mean()) < _DELTA_NORM:
        raise ConfigError(
            f"the weights in {norm.file.parent} look like a delta (the scale of their last norm "
            "is about zero): give the language model that they are to be added to as base"
        )
    if part.role != "delta" or base is None or base.shape != norm.shape:
        return
    if (scale - base[...].float()).abs().mean() < scale.abs().mean():
        raise ConfigError(f"{norm.file.parent} has full weights, not a delta: leave base out")


def _find_last_norm(part: WeightFiles) -> StoredTensor | None:
    stored = ((n, t) for file in part.files for n, t in open_file(file).items())
    return next((tensor for name, tensor in stored if _LAST_NORM.search(name)), None)


def count_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    """Return the size of the tensors in their files, in bytes."""
    return sum(t.num_elements * _BITS.get(t.dtype, 32) // 8 for t in tensors.values())


def _check_delta(name: str, base: StoredTensor, delta: StoredTensor) -> None:
    if base.shape[1:] != delta.shape[1:] or base.shape[:1] > delta.shape[:1]:
        raise ConfigError(
            f"{delta.file} is not a delta of the base {base.file.parent}: {name} is "
            f"{list(delta.shape)} in the delta and {list(base.shape)} in the base; give the base "
            "that it was made from"
        )
