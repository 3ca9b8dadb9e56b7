"""Settings from a YAML file, with `key=value` from a command line over them.

Every command that takes `CONFIG.yaml key=value ...` reads its settings here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llava_ray.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds no `name: value` lines.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read {str(path)!r} ({reason}): give a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{str(path)!r} holds no settings: write `name: value` lines in it")
    return settings


def override(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `key=value` texts into settings; `a.b=1` and `a.0.b=1` reach into sections and lists.

    Args:
        settings: changed in place.
        overrides: the part after `=` is read as YAML.

    Raises:
        ConfigError: one is not `key=value`, or there is no such place in the settings.
    """
    for text in overrides:
        key, is_given, value = text.partition("=")
        if not is_given or not key:
            raise ConfigError(f"{text!r} is not a setting: write key=value")
        try:
            _put(settings, key.split("."), yaml.safe_load(value))
        except (IndexError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise ConfigError(f"{text!r} has no place in the settings: {error}") from error


def build_config(kind: type[Model], settings: Mapping[str, Any], *, source: str = "") -> Model:
    """Return settings as a checked configuration.

    Args:
        kind: the configuration's class.
        settings: its fields.
        source: where they come from; the error begins with it.

    Raises:
        ConfigError: a setting is unknown, missing or out of its bounds; names each of them.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()]
        said = "; ".join(problem.removeprefix(": ") for problem in problems)
        raise ConfigError(f"{source}: {said}" if source else said) from error


def _put(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    place: Any = settings
    for name in path[:-1]:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    place[int(path[-1]) if isinstance(place, list) else path[-1]] = value
