"""What a checkpoint's folder holds, told from its files and never from its name.

The first step of `load_model`: whatever is wrong with a folder is said here, before anything
large is read.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from llava_ray.config import DEMO_MODEL
from llava_ray.errors import ConfigError

INDEX_FILE = "model.safetensors.index.json"
REQUIRED = {
    "weights": ("model.safetensors", INDEX_FILE),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    "picture preprocessing": ("processor_config.json", "preprocessor_config.json"),
}
"""Of each row one file must be there."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")

REMEDY = "copy it from where the checkpoint came from"


def find_folder(path: str | Path) -> Path:
    """Return the folder that `path` stands for.

    Args:
        path: a folder, a hub name ("owner/name", fetched once into the hub's cache, see
            `HF_HOME` and `HF_TOKEN`), or "demo" for the embedded model.

    Raises:
        ConfigError: there is no such folder and no such model.
    """
    if str(path) == DEMO_MODEL:
        path = Path(str(files("llava_ray"))) / "demo" / "model"
    folder = Path(path).expanduser()
    if not folder.is_dir() and HUB_NAME.fullmatch(str(path)):
        return _fetch(str(path))
    if not folder.is_dir():
        raise ConfigError(
            f"model {str(path)!r}: there is no such folder; give the folder of a checkpoint, "
            f"a hub name (owner/name), or {DEMO_MODEL!r} for the embedded model"
        )
    return folder


def _fetch(name: str) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r} is no folder here, and the hub does not give it ({reason}): check "
            "the name and the network, log in with `hf auth login` if it is gated, or give the "
            "folder of a checkpoint"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's config.json.

    Raises:
        ConfigError: the folder is no checkpoint, or not of a kind that can be loaded.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"model {str(folder)!r} is no checkpoint, it has no config.json: "
            "give the folder that holds config.json and the weights"
        )
    config = read_json(file)
    kind = config.get("model_type")
    if kind != "llava":
        raise ConfigError(
            f"model {str(folder)!r} is of the kind {kind!r}, and what can be loaded is 'llava', "
            "transformers' LlavaForConditionalGeneration: convert it to that"
        )
    return config


def require_files(folder: Path) -> None:
    """Check that every file that will be read is there.

    Raises:
        ConfigError: some are not; the message names them.
    """
    for what, names in REQUIRED.items():
        if not any((folder / name).is_file() for name in names):
            raise ConfigError(
                f"model {str(folder)!r} lacks its {what} ({' or '.join(names)}): {REMEDY}"
            )
    if (folder / INDEX_FILE).is_file():
        shards = sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values()))
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise ConfigError(
                f"model {str(folder)!r} lacks {len(missing)} of {len(shards)} weight files "
                f"({', '.join(missing[:3])}): {REMEDY}"
            )


def read_processor_settings(folder: Path) -> dict[str, Any]:
    """Return what the folder says about its processor: patch size, image token, chat template."""
    file = folder / "processor_config.json"
    settings = read_json(file) if file.is_file() else {}
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text()
    return settings


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON file's content.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}): {REMEDY}") from error
