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
            raise ConfigError(explain_json(folder, name, error)) from error


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
            raise ConfigError(explain_json(folder, name, error)) from error
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
                yield key, check_object(f"{name} {key}", reader.read_value())
        except BadJsonError as error:
            raise ConfigError(explain_json(folder, name, error)) from error


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


def _read_objects(reader: JsonReader, where: str) -> Iterator[RawRow]:
    for i, row in enumerate(reader.read_list()):
        yield check_object(f"{where}[{i}]", row)


def check_object(where: str, row: Any) -> RawRow:
    """Return a row of a file, which is rejected if it is not an object."""
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
    return check_object(where, row)


def explain_json(folder: Folder, name: str, error: Exception) -> str:
    """Return what is wrong with a file that is not JSON."""
    return f"{name!r} in {folder.address!r} is not JSON ({error}): download or write it again"
