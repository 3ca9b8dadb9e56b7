"""Reads JSON of any size one entry at a time, with bounded memory.

Python's own decoder decodes each entry, so an entry that is nested too deeply raises a
RecursionError instead of filling the memory. Such an entry is skipped and the reader goes on.
"""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from llava_ray.errors import SampleError

MAX_ENTRY_CHARS = 256 << 20
"""Longest entry that is read; images inside rows are in base64."""

_CHUNK_CHARS = 1 << 20
_LONGEST_TOKEN = 16
"""A decoder fails at most this far before the end of a text that is merely cut off."""
_SPACE = re.compile(r"[ \t\r\n]*")
_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}"]', re.DOTALL)
"""A whole string, a bracket, or the quote of a string whose end is not read yet."""
_SCALAR = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^\s\[\]{}",:]+', re.DOTALL)


class BadJsonError(ValueError):
    """A text that is not JSON."""


class JsonReader:
    """A cursor in the text of a JSON file."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._num_dropped = 0
        self._is_end = False
        self._decoder = json.JSONDecoder(strict=False)  # texts may hold raw line breaks

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or self._is_end:
                return self._text[self._at : self._at + 1]
            self._grow()

    def read_list(self) -> Iterator[Any]:
        """Yield the entries of the list at the cursor; a `SampleError` for one it cannot hold."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self.read_value()
            if self.peek() == "]":
                self._take("]")
                return
            self._take(",")

    def read_keys(self) -> Iterator[str]:
        """Yield the keys of the object at the cursor. Read or skip each value before the next."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            key = self.read_value() if self.peek() == '"' else self._fail("expected a key")
            self._take(":")
            yield key
            if self.peek() == "}":
                self._take("}")
                return
            self._take(",")

    def read_value(self) -> Any:
        """Return the value at the cursor, or a `SampleError` if it cannot be decoded.

        Raises:
            BadJsonError: it cannot be decoded, and where it ends cannot be told either.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError:
                self.skip_value()
                return SampleError(
                    "the row is nested too deeply: flatten it, or leave it out", reason="bad_row"
                )
            except json.JSONDecodeError as error:
                is_cut = (
                    error.msg.startswith("Unterminated string")
                    or error.pos >= len(self._text) - _LONGEST_TOKEN
                )
                if self._is_end or not is_cut:
                    return self._skip_broken(error)
            except ValueError as error:  # an integer with thousands of digits
                self.skip_value()
                return SampleError(f"the row cannot be read ({error})", reason="bad_row")
            else:
                if end < len(self._text) or self._is_end:  # otherwise a number may go on
                    self._at = end
                    return value
            if len(self._text) - self._at > MAX_ENTRY_CHARS:
                self.skip_value()
                return SampleError(
                    f"the row has more than {MAX_ENTRY_CHARS:,} characters: leave it out",
                    reason="too_long",
                )
            self._grow()

    def holds_objects(self) -> bool:
        """Return whether the list at the cursor begins with an object; the cursor stays."""
        while True:
            inside = self._text[self._at + 1 :].lstrip(" \t\r\n")
            if inside or self._is_end:
                return inside.startswith("{")
            self._grow()

    def skip_value(self) -> None:
        """Move the cursor behind the value at it, however deep it is."""
        if self.peek() not in ("[", "{"):
            self._skip_scalar()
            return
        depth = 0
        while True:
            found = _BRACKET.search(self._text, self._at)
            if found is None or found[0] == '"':
                self._at = len(self._text) if found is None else found.start()
                self._grow_or_fail()
                continue
            self._at = found.end()
            if found[0] in "[{":
                depth += 1
            elif found[0] in "]}":
                depth -= 1
            if not depth:
                return

    def check_end(self) -> None:
        """Raise a `BadJsonError` if anything but white space follows."""
        if self.peek():
            self._fail("there is more text after the end")

    def _skip_broken(self, error: json.JSONDecodeError) -> SampleError:
        if self.peek() not in ("[", "{"):
            self._at = error.pos
            self._fail(error.msg)
        self.skip_value()
        return SampleError(f"the row is not JSON ({error.msg}): correct it", reason="bad_row")

    def _skip_scalar(self) -> None:
        while True:
            found = _SCALAR.match(self._text, self._at)
            if found and (found.end() < len(self._text) or self._is_end):
                self._at = found.end()
                return
            self._grow_or_fail()

    def _take(self, char: str) -> None:
        if self.peek() != char:
            self._fail(f"expected {char!r}")
        self._at += 1

    def _grow_or_fail(self) -> None:
        if self._is_end:
            self._fail("the file ends too early")
        if len(self._text) - self._at > 2 * MAX_ENTRY_CHARS:
            self._fail("a text does not end")
        self._grow()

    def _grow(self) -> None:
        """Read more text, twice as much each time, and drop what the cursor has passed."""
        kept = self._text[self._at :]
        more = self._file.read(max(_CHUNK_CHARS, len(kept)))
        self._num_dropped += self._at
        self._text, self._at, self._is_end = kept + more, 0, not more

    def _fail(self, problem: str) -> Any:
        raise BadJsonError(f"{problem} at character {self._num_dropped + self._at:,}")
