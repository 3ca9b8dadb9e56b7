"""Recognises in which form a JSON file holds rows, and reads them one at a time."""

import json
from collections.abc import Iterator

from llava_ray.data.sources.building import RawRow
from llava_ray.data.sources.json_reader import BadJsonError, JsonReader
from llava_ray.data.sources.readers import (
    check_object,
    explain_json,
    list_fields,
    open_text,
    read_json_lines,
    read_json_list,
)
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder

_HEAD_CHARS = 1 << 20
_ROW_FIELDS = frozenset(("conversations", "conversation", "messages", "texts", "id", "image"))
"""Fields by which an object is recognised as a row, and not as a wrapper around rows."""


def read_rows(folder: Folder, name: str) -> Iterator[RawRow]:
    """Yield the rows of a JSON file in any usual form, whatever its ending is.

    The forms: a list of objects; one object per line; objects one after another; an object that
    wraps the list, such as `{"data": [...]}`; an object that is itself a row.

    Raises:
        ConfigError: the file is not JSON, or has another form, which the message names.
    """
    with open_text(folder, name) as file:
        head = file.read(_HEAD_CHARS).lstrip()
    form = _recognise(head, is_lines=name.lower().endswith(".jsonl"))
    if form == "lines":
        yield from read_json_lines(folder, name)
    elif form == "list":
        yield from read_json_list(folder, name)
    elif (key := _find_wrapped(folder, name)) is not None:
        yield from read_json_list(folder, name, key)
    else:
        yield from _read_sequence(folder, name)


def _recognise(head: str, *, is_lines: bool) -> str:
    """Return the form of a JSON file from its first characters: lines, list or objects."""
    first, _, rest = head.partition("\n")
    more = rest.lstrip()
    if _is_json(first):
        return "lines" if more else {"[": "list"}.get(first[:1], "objects")
    if first.startswith("["):
        return "list"
    is_pretty = first.strip() == "{"
    if first.startswith("{") and (is_pretty or not is_lines):
        second = more.partition("\n")[0]
        return "lines" if second.startswith("{") and _is_json(second) else "objects"
    return "lines"


def _is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True


def _find_wrapped(folder: Folder, name: str) -> str | None:
    """Return the key of the only list of objects in a file's object, None if it wraps none.

    Raises:
        ConfigError: the file wraps several lists, or objects by key.
    """
    keys: list[str] = []
    lists: list[str] = []
    num_objects = 0
    with open_text(folder, name) as file:
        reader = JsonReader(file)
        try:
            for key in reader.read_keys():
                if key in _ROW_FIELDS:
                    return None
                keys.append(key)
                num_objects += reader.peek() == "{"
                if reader.peek() == "[" and reader.holds_objects():
                    lists.append(key)
                reader.skip_value()
        except BadJsonError as error:
            raise ConfigError(explain_json(folder, name, error)) from error
    if len(lists) == 1:
        return lists[0]
    where = f"{name!r} in {folder.address!r}"
    if {"images", "annotations"} <= set(lists):
        raise ConfigError(f"{where} has the form of COCO's annotations: use the source coco")
    if lists:
        raise ConfigError(
            f"{where} has several lists of rows ({list_fields(lists)}): write each to a file of "
            "its own"
        )
    if num_objects and num_objects == len(keys):
        raise ConfigError(
            f"{where} is an object of rows by key ({list_fields(keys)}): write the rows as a list"
        )
    return None


def _read_sequence(folder: Folder, name: str) -> Iterator[RawRow]:
    """Yield objects that stand one after another."""
    with open_text(folder, name) as file:
        reader = JsonReader(file)
        number = 0
        try:
            while reader.peek():
                yield check_object(f"{name}[{number}]", reader.read_value())
                number += 1
        except BadJsonError as error:
            raise ConfigError(explain_json(folder, name, error)) from error
