"""Writes checkpoint folders atomically, and weights in shards.

Everything that writes a checkpoint (`export`, `build`, `delta`) writes into a scratch folder next
to the target and moves it there at the end, so that readers never see an incomplete folder and a
failure leaves nothing behind.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llava_ray.errors import ConfigError

INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
_UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10}
_REPLACEABLE = ("config.json", "adapter_config.json")
"""Files of which a folder must have one before `overwrite` removes it."""


@contextlib.contextmanager
def write_folder(
    out: str | Path,
    *,
    overwrite: bool = False,
    sources: Sequence[Path | None] = (),
    num_bytes: int = 0,
) -> Iterator[Path]:
    """Give an empty folder to write to; move it to `out` when the block ends without an error.

    Args:
        out: the folder to write; its parents are created.
        overwrite: replace an existing checkpoint.
        sources: folders that are read; `out` must not contain one or be inside one.
        num_bytes: about how much will be written.

    Raises:
        ConfigError: `out` is not empty and `overwrite` is not set, or it cannot be written.
    """
    target = Path(out).expanduser().resolve()
    _check_target(out, target, overwrite)
    _check_sources(out, target, sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(out, target.parent, num_bytes)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(out)!r} ({error.strerror}): give another folder"
        ) from error
    try:
        yield scratch
        scratch.chmod(0o755)
        _move(scratch, target)
    except SafetensorError as error:
        raise ConfigError(
            f"cannot write {str(out)!r} ({error}): make room, or give another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        raise ConfigError(
            f"cannot write {str(out)!r} ({error.strerror}): make room, or give another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_target(out: str | Path, target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"cannot write {str(out)!r}: it is a file; give a new folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{str(out)!r} is not empty: give a new folder, or --overwrite to replace it"
        )
    if not any((target / name).is_file() for name in _REPLACEABLE):
        raise ConfigError(
            f"{str(out)!r} is not a checkpoint (it has no {' or '.join(_REPLACEABLE)}), and "
            "--overwrite does not remove anything else: give a new folder"
        )


def _check_sources(out: str | Path, target: Path, sources: Sequence[Path | None]) -> None:
    for source in sources:
        folder = source and source.expanduser().resolve()
        if folder and (target == folder or folder in target.parents or target in folder.parents):
            raise ConfigError(
                f"{str(out)!r} and the input {str(source)!r} are the same or inside one another: "
                "give another folder"
            )


def _check_space(out: str | Path, place: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise ConfigError(
            f"cannot write {str(out)!r}: it needs {num_bytes / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free there; make room, or give another folder"
        )


def _move(scratch: Path, target: Path) -> None:
    if not target.exists():
        os.replace(scratch, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
    os.replace(target, old)
    try:
        os.replace(scratch, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def parse_size(text: str | int) -> int:
    """Return the bytes that "5GB" or "500MiB" stand for.

    Raises:
        ConfigError: it is not a size.
    """
    if isinstance(text, int):
        return text
    number = text.strip().upper().rstrip("GMKIB")
    unit = text.strip().upper().removeprefix(number).strip()
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{text!r} is not a size: write for example 5GB or 500MB") from error
    if size <= 0:
        raise ConfigError(f"{text!r} is not a file size: write for example 5GB")
    return size


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
    """Write tensors as safetensors files of at most `max_shard_size` (or of a single tensor).

    One file is `model.safetensors`; several are numbered and listed in an index, as transformers
    writes them. Only one file's tensors are in memory at a time.

    Args:
        folder: the folder.
        tensors: with their names in the file, in any precision and on any device.
        max_shard_size: "5GB", "500MiB" or a number of bytes.
    """
    limit = parse_size(max_shard_size)
    written: list[tuple[Path, list[str]]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = total = 0

    def flush() -> None:
        nonlocal held, held_bytes
        if held:
            file = folder / f"part-{len(written)}.safetensors"
            save_file(held, file, metadata={"format": "pt"})
            file.chmod(0o644)
            written.append((file, list(held)))
        held, held_bytes = {}, 0

    for name, tensor in tensors:
        if held_bytes + tensor.nbytes > limit:
            flush()
        held[name] = tensor.detach().to("cpu").contiguous()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    _number_shards(folder, written, total)


def _number_shards(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    if len(written) == 1:
        os.replace(written[0][0], folder / "model.safetensors")
        return
    weight_map = {}
    for number, (file, names) in enumerate(written, 1):
        shard = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        os.replace(file, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers does: indented, with a final line break."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
