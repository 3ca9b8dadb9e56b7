"""Finds a checkpoint's folder: a name, an address or a path -> a folder on this machine.

`inspect` then recognises what the folder holds.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from llava_ray.config import DEMO_MODEL
from llava_ray.errors import ConfigError
from llava_ray.storage import fetch_folder

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
PICKLED_FILES = ("*.bin",)
"""Downloaded from the hub only if it has no safetensors."""

_POINTER = b"version https://git-lfs.github.com/spec/"

_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
_TYPES: dict[str, type] = {
    **dict.fromkeys(("model_type", "mm_vision_tower", "vision_tower", "mm_projector_type"), str),
    **dict.fromkeys(("mm_patch_merge_type", "image_aspect_ratio", "mm_tunable_parts"), str),
    **dict.fromkeys(("llava_ray_template", "llava_ray_base", "base_model_name_or_path"), str),
    **dict.fromkeys(("_name_or_path", "image_processor_type", "peft_type"), str),
    **dict.fromkeys(("image_token_index", "image_token_id"), int),
    **dict.fromkeys(("text_config", "vision_config", "quantization_config", "weight_map"), dict),
    "architectures": list,
}
"""The types of fields that are read, in whichever file of a checkpoint they stand; null is none."""

REMEDY = "copy it from where the checkpoint came from"


def find_folder(path: str | Path) -> Path:
    """Return the folder that `path` stands for.

    Args:
        path: a folder; a hub name ("owner/name"), which is downloaded once into the hub's cache
            (see `HF_HOME` and `HF_TOKEN`); an address ("s3://...") that fsspec knows, which is
            copied once (see `fetch_folder`); or "demo" for the embedded model.

    Raises:
        ConfigError: there is no such folder and no such model.
        MissingPackageError: the package for that kind of address is not installed.
    """
    if "://" in str(path):
        return fetch_folder(str(path))
    if str(path) == DEMO_MODEL:
        path = Path(str(files("llava_ray"))) / "demo" / "model"
    folder = Path(path).expanduser()
    if not folder.is_dir() and HUB_NAME.fullmatch(str(path)):
        return _fetch(str(path))
    if not folder.is_dir():
        raise ConfigError(
            f"model {str(path)!r}: there is no such folder; give the folder of a checkpoint, "
            f"a hub name (owner/name), an address (s3://...), or {DEMO_MODEL!r} for the embedded "
            "model"
        )
    return folder


def _fetch(name: str) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=[*HUB_FILES, *PICKLED_FILES])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r} is not a local folder and could not be downloaded from the hub "
            f"({reason}): check the name and the network, log in with `hf auth login` if it is "
            "gated, or give the folder of a checkpoint"
        ) from error


def read_processor_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's processor: patch size, image token, chat template.

    Fields that are null are left out: they say nothing. The template is that of
    chat_template.jinja, of processor_config.json or, in older folders, of chat_template.json.

    Raises:
        ConfigError: a file is not JSON.
    """
    settings = {}
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            settings |= {field: value for field, value in found.items() if value is not None}
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text()
    return settings


def check_pointer(file: Path) -> None:
    """Raise a ConfigError if a file is Git LFS's pointer in place of its content."""
    with file.open("rb") as opened:
        is_pointer = opened.read(len(_POINTER)) == _POINTER
    if is_pointer:
        raise ConfigError(
            f"{file} is a Git LFS pointer, not the file itself: the repository was cloned without "
            "its large files; run `git lfs pull` in it, or give the hub name, which downloads them"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: it is not JSON, or not an object.
    """
    if file.is_file():
        check_pointer(file)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not JSON ({error}): {REMEDY}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object: {REMEDY}")
    for name, kind in _TYPES.items():
        value = content.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(
                f"{file}: {name} is {str(value)[:80]!r}, and not {_KINDS[kind]}: {REMEDY}"
            )
    return content
