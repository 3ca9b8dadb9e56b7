"""Writes the files of an evaluation: whole or not at all, whatever characters a response holds.

A response may hold lone surrogates, which UTF-8 cannot encode, control characters, and characters
that some programs take for the end of a line. JSON keeps them all, as escapes. Where a format has
no escape, `to_utf8` and `make_visible` write them as signs that can be read.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_ray.storage import open_folder

_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n\r"}
_CONTROLS |= {0x7F: "\u2421"} | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_CONTROLS |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that holds every string whole, and without `indent` stands on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=indent).translate(_LINE_ENDS)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def to_utf8(value: Any) -> Any:
    """Return a record with each lone surrogate written as its escape, such as "\\ud800"."""
    if isinstance(value, str):
        return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", value)
    if isinstance(value, dict):
        return {to_utf8(name): to_utf8(each) for name, each in value.items()}
    return [to_utf8(each) for each in value] if isinstance(value, list | tuple) else value


def make_visible(text: str) -> str:
    """Return a text with its control characters as visible signs, for a page or a terminal."""
    return to_utf8(text).translate(_CONTROLS)


def write_text(path: Path, text: str) -> Path:
    """Write a file as UTF-8; nobody ever sees a half-written one."""
    open_folder(str(path.parent)).write(path.name, to_utf8(text).encode())
    return path


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> Path:
    """Write a JSON file."""
    return write_text(path, dump_json(value, indent=indent) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> Path:
    """Write a file with one JSON value on each line."""
    return write_text(path, "".join(f"{dump_json(value)}\n" for value in values))
