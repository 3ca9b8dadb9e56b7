"""What vLLM and SGLang are started with: their Python, a folder that they read, their arguments."""

import difflib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.config import PYTHON_VARIABLES, ModelConfig
from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import inspect_checkpoint
from llava_ray.model.checkpoint.weights import find_weights, open_file
from llava_ray.model.export.export import export_model
from llava_ray.storage import find_cache

WORKERS = Path(__file__).parent / "worker"
OWN_OPTIONS = ("python", "start_timeout_s", "environment")
"""Of `engine_options`: these are ours, all others are arguments of the engine's."""

START_TIMEOUT_S = 900.0
MAX_IMAGES = 16
_TOWER = "vision_tower.vision_model."  # as in folders of the hub; newer ones have another name


@dataclass(frozen=True)
class ExternalEngineKind:
    """An engine that works in a process of its own.

    Attributes:
        name: in the configuration; also of the package.
        label: in messages.
        arguments: what it is told of a model: (configuration, folder, is there a GPU).
        environment: variables that it needs: (configuration, is there a GPU).
        unsupported: fields of `Sampling` that it does not do as ours does: (configuration).
        program: what runs in the engine's Python; by default the one in `worker/`.
    """

    name: str
    label: str
    arguments: Callable[[ModelConfig, Path, bool], dict[str, Any]]
    environment: Callable[[ModelConfig, bool], dict[str, str]]
    unsupported: Callable[[ModelConfig], tuple[str, ...]] = lambda config: ()
    program: Path | None = None


@dataclass(frozen=True)
class EngineLaunch:
    """How an engine's process is started, and the folder of its model."""

    folder: Path
    command: tuple[str, ...]
    environment: dict[str, str]
    timeout_s: float


def build_launch(config: ModelConfig, kind: ExternalEngineKind) -> EngineLaunch:
    """Return how to start the engine of a configuration.

    Raises:
        ConfigError: the engine is not there, or cannot have this model.
    """
    import torch

    options = dict(config.engine_options)
    python = find_python(kind, options.pop("python", None))
    timeout_s = float(options.pop("start_timeout_s", START_TIMEOUT_S))
    environment = {str(k): str(v) for k, v in options.pop("environment", {}).items()}
    for name in options:
        if close := difflib.get_close_matches(name, OWN_OPTIONS, n=1, cutoff=0.8):
            raise ConfigError(f"unknown setting engine_options.{name}: did you mean {close[0]}?")
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    folder = prepare_folder(config.path)
    arguments = kind.arguments(config, folder, on_gpu) | options
    return EngineLaunch(
        folder,
        (python, str(kind.program or WORKERS / f"{kind.name}_worker.py"), json.dumps(arguments)),
        kind.environment(config, on_gpu) | environment,
        timeout_s,
    )


def find_python(kind: ExternalEngineKind, given: str | None) -> str:
    """Return the Python of an engine's environment.

    Raises:
        ConfigError: none is named, and this environment does not have the engine.
    """
    variable = PYTHON_VARIABLES.get(kind.name, "")
    if python := given or os.environ.get(variable):
        return str(Path(python).expanduser())
    if importlib.util.find_spec(kind.name):
        return sys.executable
    raise ConfigError(
        f"engine={kind.name!r} needs {kind.label}, which is not installed here. Give it an "
        f"environment of its own (python3 -m venv {kind.name} && {kind.name}/bin/pip install "
        f"{kind.name}) and name its Python with engine_options.python or {variable}"
    )


def prepare_folder(path: str) -> Path:
    """Return a folder of a model that all engines read: its own, or an export of it that is kept.

    Raises:
        ConfigError: as of `export_model`.
    """
    checkpoint = inspect_checkpoint(path)
    files = find_weights(checkpoint.folder) if checkpoint.format == "hf" else ()
    if any(name.startswith(_TOWER) for file in files for name in open_file(file)):
        return checkpoint.folder
    sources = [
        part for part in (checkpoint.folder, checkpoint.base, checkpoint.tower_folder) if part
    ]
    facts = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for folder in sources
        for file in sorted(folder.iterdir())
    ]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = find_cache("exports") / f"{checkpoint.folder.name}-{digest}"
    if not folder.is_dir():
        try:
            export_model(path, folder, to="hf")
        except ConfigError:
            if not folder.is_dir():  # or another replica was faster
                raise
    return folder
