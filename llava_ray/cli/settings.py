"""`[CONFIG.yaml] KEY=VALUE ...`: the words of each command that has settings, and their help.

words and flags -> read_words -> collect_settings -> config.files.build_config
"""

import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer.core
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.text import Text

from llava_ray.cli.console import out
from llava_ray.config.files import override, read_settings
from llava_ray.errors import ConfigError

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_YAML = (".yaml", ".yml")
_INDENT = " " * 5


class Words(NamedTuple):
    """A command's words, sorted: a YAML file, one other name, and `key=value` settings."""

    file: str | None
    name: str | None
    overrides: list[str]


class Setting(NamedTuple):
    """A setting as `--help` lists it.

    Attributes:
        name: as `key=value` names it, with dots for what is inside others.
        kind: what its value may be, in words.
        default: in YAML; None if the setting must be given, "" if there is none.
        description: its sentence.
    """

    name: str
    kind: str
    default: str | None
    description: str


def read_words(words: Sequence[str] | None) -> Words:
    """Sort a command's words by their form.

    Raises:
        ConfigError: there are two files or two names.
    """
    file, name, overrides = None, None, []
    for word in words or ():
        if _OVERRIDE.match(word):
            overrides.append(word)
        elif word.lower().endswith(_YAML):
            file = _take_one(file, word, "YAML file")
        else:
            name = _take_one(name, word, "name")
    return Words(file, name, overrides)


def collect_settings(words: Words, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from a file, with `key=value` over them, and flags over these.

    Args:
        words: as of `read_words`.
        flags: by the name of their setting, "limits.max_images" reaches inside; None: not given.

    Raises:
        ConfigError: the file cannot be read, or a setting has no place in it.
    """
    settings = read_settings(words.file) if words.file else {}
    override(settings, words.overrides)
    for name, value in flags.items():
        if value is not None:
            *path, last = name.split(".")
            place = settings
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
    return settings


def list_settings(kind: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Yield all settings of a configuration; those inside a section follow it."""
    for name, field in kind.model_fields.items():
        section = _find_section(field.annotation)
        inside = f"{prefix}{name}." + "0." * (get_origin(field.annotation) is list)
        is_list = section is not None and inside.endswith(".0.")
        if section is None or is_list:
            yield Setting(
                f"{prefix}{name}",
                "list, see below" if is_list else _describe_type(field.annotation),
                _describe_default(field),
                field.description or "",
            )
        if section is not None:
            yield from list_settings(section, inside)


def make_command_class(
    config: type[BaseModel], *, without: Sequence[str] = ()
) -> type[typer.core.TyperCommand]:
    """Return the class of a command whose `--help` ends with all settings of `config`."""

    class SettingsCommand(typer.core.TyperCommand):
        def get_usage(self, ctx: Any) -> str:
            return super().get_usage(ctx).replace("  [OPTIONS]", " [OPTIONS]")  # of a nameless one

        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            _print_settings([each for each in list_settings(config) if each.name not in without])

    return SettingsCommand


def _print_settings(settings: Sequence[Setting]) -> None:
    out.print(Text(" Settings, in CONFIG.yaml or as KEY=VALUE", style="bold"))
    for setting in settings:
        default = {None: "required", "": ""}.get(setting.default, f"default: {setting.default}")
        line = Text(f" {setting.name}", style="bold cyan")
        line.append(f"  {setting.kind}", style="yellow")
        line.append(f"  [{default}]" if default else "", style="dim")
        out.print(line)
        for part in textwrap.wrap(setting.description, out.width - len(_INDENT) - 1):
            out.print(_INDENT + part, markup=False)
    out.print()


def _take_one(before: str | None, word: str, kind: str) -> str:
    if before is not None:
        raise ConfigError(
            f"{before!r} and {word!r} are both a {kind}: give one; settings are key=value"
        )
    return word


def _find_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, or that a list in it holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, types.UnionType, Annotated):
        found = [_find_section(each) for each in get_args(annotation)]
        return next((each for each in found if each), None)
    return None


def _describe_type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe_type(args[0])
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (Union, types.UnionType):
        return "|".join(_describe_type(each) for each in args if each is not type(None))
    if origin is list:
        return f"list of {_describe_type(args[0])}"
    if origin is dict:
        return f"{_describe_type(args[0])}: {_describe_type(args[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "true|false", Any: "any"}
    return names.get(annotation, "text" if annotation is SecretStr else annotation.__name__)


def _describe_default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=False)
    if value in (None, PydanticUndefined, "", []):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
