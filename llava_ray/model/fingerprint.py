"""What tells one model that answers from another: a digest of its weights and settings.

Replicas compute it once, when they load, and put it into every response (`system_fingerprint` of
the OpenAI API). Two responses with the same fingerprint come from the same weights.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_ray.config import ModelConfig
from llava_ray.model.checkpoint.locate import find_folder
from llava_ray.storage import hash_file

PREFIX = "fp_llava_"
"""Begins every fingerprint of this program: that of another server need not cover the weights."""

_FILES_AT_ONCE = 4


def make_fingerprint(config: ModelConfig, adapter: str = "") -> str:
    """Return the fingerprint of a model, or of one of its adapters.

    It covers the content of every file of the weights and the settings that change answers, with
    the precision that "auto" stands for on this machine.

    Raises:
        ConfigError: there is no such model.
    """
    paths = [config.path, *([config.adapters[adapter]] if adapter else [])]
    if config.engine != "echo":  # which has no weights
        paths = [digest_folder(find_folder(path)) for path in paths]
    settings = [config.engine, _find_precision(config), config.quantization, config.template]
    options = {k: str(v) for k, v in sorted(config.engine_options.items())}
    content = json.dumps([paths, *settings, options])
    return PREFIX + hashlib.sha256(content.encode()).hexdigest()[:16]


def _find_precision(config: ModelConfig) -> str:
    if config.engine != "torch" or config.dtype != "auto":
        return config.dtype
    from llava_ray.model.devices import select_device
    from llava_ray.model.loading import select_dtype

    return str(select_dtype(config.dtype, select_device(config.device))).removeprefix("torch.")


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of the files in a folder, hidden ones aside."""
    names = sorted(
        name
        for path in folder.rglob("*")
        if path.is_file()
        and not (name := path.relative_to(folder).as_posix()).startswith(".")
        and "/." not in name
    )
    whole = hashlib.sha256()
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        digests = pool.map(hash_file, [folder / name for name in names])
        for name, digest in zip(names, digests, strict=True):
            whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()
