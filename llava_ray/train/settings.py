"""A run's settings from a YAML file, with `key=value` from the command line over it.

The first step of training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llava_ray.config import TrainConfig
from llava_ray.errors import ConfigError


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration in a YAML file.

    Args:
        path: of the file.
        overrides: `key=value`, the value in YAML; `data.max_length=2048` and
            `data.datasets.0.path=...` reach inside.

    Raises:
        ConfigError: there is no such file, it is no YAML, or it cannot be run.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read {str(path)!r} ({error.strerror}): give a YAML file, as those in "
            "jobs/configs"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{str(path)!r} holds no settings: it must be `name: value` lines")
    for override in overrides:
        _apply(settings, override)
    try:
        return TrainConfig(**settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()]
        lines = [problem.removeprefix(": ") for problem in problems]
        raise ConfigError(f"{path}: {'; '.join(lines)}") from error


def _apply(settings: dict[str, Any], override: str) -> None:
    """Put one `key=value` into settings."""
    key, is_given, text = override.partition("=")
    if not is_given or not key:
        raise ConfigError(f"{override!r} is no setting: write key=value")
    *path, last = key.split(".")
    place: Any = settings
    try:
        for name in path:
            if isinstance(place, list):
                place = place[int(name)]
                continue
            place = place.setdefault(name, {})
        value = yaml.safe_load(text)
        place[int(last) if isinstance(place, list) else last] = value
    except (IndexError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{override!r} has no place in the settings: {error}") from error
