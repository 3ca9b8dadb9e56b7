"""Reads the files that raw data comes in, a row at a time where the format allows it."""

import json
from collections.abc import Iterator
from typing import Any

import ijson

from llava_ray.data.sources.building import RawRow
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import Folder


def read_json(folder: Folder, name: str) -> Any:
    """Return what a JSON file holds, all of it.

    Raises:
        ConfigError: it is not there, or no JSON.
    """
    try:
        return json.loads(folder.read(name))
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {name!r} in {folder.address!r}: give the folder that holds it"
        ) from error
    except ValueError as error:
        raise ConfigError(_explain(folder, name, error)) from error


def read_json_list(folder: Folder, name: str, place: str = "item") -> Iterator[RawRow]:
    """Yield the entries of a list in a JSON file, which is never in memory as a whole.

    Args:
        folder: where it is.
        name: of the file.
        place: of the list, as ijson writes it ("item", "data.item").

    Raises:
        ConfigError: the file is no JSON.
    """
    with folder.open(name) as file:
        try:
            for i, row in enumerate(ijson.items(file, place, use_float=True)):
                yield RawRow(f"{name}[{i}]", row)
        except ijson.JSONError as error:
            raise ConfigError(_explain(folder, name, error)) from error


def read_json_dict(folder: Folder, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a JSON file's dictionary, one at a time.

    Raises:
        ConfigError: the file is no JSON.
    """
    with folder.open(name) as file:
        try:
            yield from ijson.kvitems(file, "", use_float=True)
        except ijson.JSONError as error:
            raise ConfigError(_explain(folder, name, error)) from error


def read_json_lines(folder: Folder, name: str) -> Iterator[RawRow]:
    """Yield the rows of a file with one JSON object a line; a broken line is a row of its own."""
    with folder.open(name) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no object")
                yield RawRow(where, row)
            except ValueError as error:
                problem = f"line {number} of {name!r} is no JSON object ({error}): correct it"
                yield RawRow(where, SampleError(problem, reason="bad_row"))


def find_one(folder: Folder, names: list[str], *choices: str) -> str:
    """Return the first name that is among the files, in whatever folder.

    Raises:
        ConfigError: none is.
    """
    for choice in choices:
        for name in names:
            if name == choice or name.endswith(f"/{choice}"):
                return name
    wanted = " or ".join(dict.fromkeys(choices))
    raise ConfigError(f"there is no {wanted} in {folder.address!r}: give the folder that holds it")


def _explain(folder: Folder, name: str, error: Exception) -> str:
    return f"{name!r} in {folder.address!r} is no JSON ({error}): fetch or write it again"
