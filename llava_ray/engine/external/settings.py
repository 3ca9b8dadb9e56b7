"""How the worker of vLLM or SGLang is launched: which Python, which model folder, which arguments.

`build_launch` turns a model's configuration and an `ExternalEngineKind` into an `EngineLaunch`.
"""

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
from llava_ray.model.devices import computes_on_gpu, read_capability
from llava_ray.model.export.export import export_model
from llava_ray.model.precision import FIRST_BFLOAT16, choose_dtype
from llava_ray.storage import find_cache

WORKERS = Path(__file__).parent / "worker"
OWN_OPTIONS = ("python", "start_timeout_s", "environment")
"""Keys of `engine_options` that are settings of this package; all others go to the engine."""

START_TIMEOUT_S = 900.0
MAX_IMAGES = 16
CPU_REQUESTS, CPU_TOKENS = 32, 16384
"""What an engine on a CPU computes at once unless it is set: its own defaults are for GPUs."""

_TOWER = "vision_tower.vision_model."  # as on the hub; newer transformers save another name


@dataclass(frozen=True)
class ExternalEngineKind:
    """What is specific to one external engine.

    Attributes:
        name: the engine's name in the configuration; also the name of its Python package.
        label: its name in messages.
        arguments: (configuration, model folder, whether on a GPU) -> the engine's arguments.
        environment: (configuration, whether on a GPU) -> environment variables that it needs.
        unsupported: configuration -> fields of `Sampling` that it lacks or implements differently.
        program: the script for the engine's Python; by default the one in `worker/`.
    """

    name: str
    label: str
    arguments: Callable[[ModelConfig, Path, bool], dict[str, Any]]
    environment: Callable[[ModelConfig, bool], dict[str, str]]
    unsupported: Callable[[ModelConfig], tuple[str, ...]] = lambda config: ()
    program: Path | None = None


@dataclass(frozen=True)
class EngineLaunch:
    """How to start an engine's process, and the model folder that it reads."""

    folder: Path
    command: tuple[str, ...]
    environment: dict[str, str]
    timeout_s: float
    device: str


def build_launch(config: ModelConfig, kind: ExternalEngineKind) -> EngineLaunch:
    """Return how to start the engine of a configuration.

    Raises:
        ConfigError: the engine is not installed, an option is misspelled, or the model cannot be
            loaded or exported.
    """
    options = dict(config.engine_options)
    python = find_python(kind, options.pop("python", None))
    timeout_s = float(options.pop("start_timeout_s", START_TIMEOUT_S))
    environment = {str(k): str(v) for k, v in options.pop("environment", {}).items()}
    for name in options:
        if close := difflib.get_close_matches(name, OWN_OPTIONS, n=1, cutoff=0.8):
            raise ConfigError(f"unknown setting engine_options.{name}: did you mean {close[0]}?")
    on_gpu = config.device != "cpu" and computes_on_gpu()
    folder = prepare_folder(config.path)
    arguments = kind.arguments(config, folder, on_gpu) | options
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}  # Ray leaves GPUs visible to all
    return EngineLaunch(
        folder,
        (python, str(kind.program or WORKERS / f"{kind.name}_worker.py"), json.dumps(arguments)),
        hidden | kind.environment(config, on_gpu) | environment,
        timeout_s,
        "cuda" if on_gpu else "cpu",
    )


def choose_dtype_name(config: ModelConfig, *, on_gpu: bool) -> str:
    """Return the precision in which the torch engine would compute: engines must agree.

    Left to "auto", vLLM and SGLang take that of the files, which is float16 for most LLaVAs.
    """
    if config.dtype != "auto":
        return config.dtype
    if on_gpu:
        capability = read_capability()
        return "bfloat16" if capability is None or capability >= FIRST_BFLOAT16 else "float16"
    return str(choose_dtype("cpu")).removeprefix("torch.")


def find_python(kind: ExternalEngineKind, given: str | None) -> str:
    """Return the Python of an engine's environment.

    Raises:
        ConfigError: none is configured, and the engine is not installed in this environment.
    """
    variable = PYTHON_VARIABLES.get(kind.name, "")
    if python := given or os.environ.get(variable):
        return str(Path(python).expanduser())
    if importlib.util.find_spec(kind.name):
        return sys.executable
    raise ConfigError(
        f"engine={kind.name!r} needs {kind.label}, which is not installed here. Install it in a "
        f"separate environment (python3 -m venv {kind.name} && {kind.name}/bin/pip install "
        f"{kind.name}) and set engine_options.python or {variable} to that environment's Python"
    )


def prepare_folder(path: str) -> Path:
    """Return a folder of the model in the hub's format: its own, or a cached export of it.

    Raises:
        ConfigError: see `export_model`.
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
            if not folder.is_dir():  # unless another replica has just exported it
                raise
    return folder
