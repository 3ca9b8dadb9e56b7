"""Reads the files of raw data one row at a time: JSON, JSON lines and plain text.

Text files may be in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32. Bytes that are not
UTF-8 become lone surrogates, by which `validate` recognises the rows that hold them.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from llava_ray.data.sources.building import BROKEN_ROW, RawRow, Row, describe
from llava_ray.data.sources.json_reader import MAX_ENTRY_CHARS, BadJsonError, JsonReader
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import Folder

MAX_TEXT_BYTES = 1 << 20
"""Largest file that holds the text of a single image."""

_HEAD_CHARS = 1 << 20
ROW_FIELDS = frozenset(("conversations", "conversation", "messages", "texts", "id", "image"))
"""Fields by which an object is recognised as a row, and not as a wrapper around rows."""


@contextmanager
def open_text(folder: Folder, name: str) -> Iterator[IO[str]]:
    """Open a text file in whatever Unicode encoding it has.

    Raises:
        ConfigError: it is not there, or it claims an encoding that it does not have.
    """
    try:
        with folder.open(name) as file:
            encoding = json.detect_encoding(file.read(4))
            file.seek(0)
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            yield io.TextIOWrapper(file, encoding, errors, newline="\n")
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {name!r} in {folder.address!r}: give the folder that holds it"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name!r} in {folder.address!r} is not the {error.encoding.upper()} that it begins "
            "as: save it as UTF-8"
        ) from error


def decode_text(data: bytes, name: str) -> str:
    """Return the text in a small file.

    Raises:
        SampleError: it is not in a Unicode encoding.
    """
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = data[error.start : error.start + 1]
        raise SampleError(
            f"{name} is not {encoding.upper()}: byte {error.start + 1} is 0x{byte.hex()}, which is "
            f"{byte.decode('latin-1')!r} in Latin-1: save it as UTF-8",
            reason="encoding",
        ) from None


def read_json(folder: Folder, name: str) -> Any:
    """Return the content of a JSON file, all of it.

    Raises:
        ConfigError: it is not there, or is not JSON.
    """
    with open_text(folder, name) as file:
        try:
            return json.loads(file.read(), strict=False)
        except (ValueError, RecursionError) as error:
            raise ConfigError(_explain(folder, name, error)) from error


def read_json_object(folder: Folder, name: str, **parts: type) -> Row:
    """Return the object in a JSON file, all of it.

    Args:
        folder: where the file is.
        name: of the file.
        parts: keys that the object must have, with the types of their values.

    Raises:
        ConfigError: it is not there, is not JSON, or lacks a part.
    """
    content = read_json(folder, name)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{name!r} in {folder.address!r} holds {describe(content)}, not an object"
        )
    for part, kind in parts.items():
        if not isinstance(content.get(part), kind):
            raise ConfigError(
                f"{name!r} in {folder.address!r} has no {kind.__name__} {part!r}, but the fields "
                f"{list_fields(content)}: give the file as it was published"
            )
    return content


def read_json_list(folder: Folder, name: str, key: str = "") -> Iterator[RawRow]:
    """Yield the objects in a JSON file's list, which is never in memory as a whole.

    Args:
        folder: where the file is.
        name: of the file.
        key: of the list in the file's object; "": the file is the list.

    Raises:
        ConfigError: the file is not JSON, or has no such list.
    """
    with open_text(folder, name) as file:
        reader = JsonReader(file)
        try:
            if not key:
                yield from _read_objects(reader, name)
                reader.check_end()
                return
            keys: list[str] = []
            for found in reader.read_keys():
                keys.append(found)
                if found == key:
                    yield from _read_objects(reader, f"{name} {key}")
                    return
                reader.skip_value()
        except BadJsonError as error:
            raise ConfigError(_explain(folder, name, error)) from error
    raise ConfigError(
        f"{name!r} in {folder.address!r} has no {key!r}, but the fields {list_fields(keys)}: give "
        "the file as it was published"
    )


def read_json_dict(folder: Folder, name: str) -> Iterator[tuple[str, RawRow]]:
    """Yield the keys and the objects below them of a JSON file, one at a time.

    Raises:
        ConfigError: the file is not JSON.
    """
    with open_text(folder, name) as file:
        reader = JsonReader(file)
        try:
            for key in reader.read_keys():
                yield key, _check_object(f"{name} {key}", reader.read_value())
        except BadJsonError as error:
            raise ConfigError(_explain(folder, name, error)) from error


def read_json_lines(folder: Folder, name: str) -> Iterator[RawRow]:
    """Yield the rows of a file with one JSON object per line; a broken line is a rejected row."""
    with open_text(folder, name) as file:
        number = 0
        while line := file.readline(MAX_ENTRY_CHARS):
            number += 1
            where = f"{name}:{number}"
            if len(line) == MAX_ENTRY_CHARS:
                while line and not line.endswith("\n"):
                    line = file.readline(MAX_ENTRY_CHARS)
                problem = f"line {number} of {name!r} has more than {MAX_ENTRY_CHARS:,} characters"
                yield RawRow(where, SampleError(problem, reason="too_long"))
            elif line.strip():
                yield _parse_line(where, line, name, number)


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


def find_one(folder: Folder, names: list[str], *choices: str) -> str:
    """Return the first of several file names that is there, in whatever subfolder.

    Raises:
        ConfigError: none is.
    """
    for choice in choices:
        for name in names:
            if name == choice or name.endswith(f"/{choice}"):
                return name
    wanted = " or ".join(dict.fromkeys(choices))
    raise ConfigError(f"there is no {wanted} in {folder.address!r}: give the folder that holds it")


def list_fields(fields: Any) -> str:
    """Return the names of an object's fields for a message, the first ten of them."""
    names = [str(field)[:40] for field in list(fields)[:10]]
    return ", ".join(names) + (", ..." if len(fields) > len(names) else "") if names else "none"


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
                if key in ROW_FIELDS:
                    return None
                keys.append(key)
                num_objects += reader.peek() == "{"
                if reader.peek() == "[" and reader.holds_objects():
                    lists.append(key)
                reader.skip_value()
        except BadJsonError as error:
            raise ConfigError(_explain(folder, name, error)) from error
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
                yield _check_object(f"{name}[{number}]", reader.read_value())
                number += 1
        except BadJsonError as error:
            raise ConfigError(_explain(folder, name, error)) from error


def _read_objects(reader: JsonReader, where: str) -> Iterator[RawRow]:
    for i, row in enumerate(reader.read_list()):
        yield _check_object(f"{where}[{i}]", row)


def _check_object(where: str, row: Any) -> RawRow:
    if isinstance(row, dict | SampleError):
        return RawRow(where, row)
    problem = f"the row is {describe(row)}, not an object"
    return RawRow(where, SampleError(problem, reason="bad_row"))


def _parse_line(where: str, line: str, name: str, number: int) -> RawRow:
    try:
        row = json.loads(line, strict=False)
    except BROKEN_ROW as error:
        problem = f"line {number} of {name!r} is not a JSON object ({error}): correct it"
        return RawRow(where, SampleError(problem, reason="bad_row"))
    return _check_object(where, row)


def _explain(folder: Folder, name: str, error: Exception) -> str:
    return f"{name!r} in {folder.address!r} is not JSON ({error}): download or write it again"
