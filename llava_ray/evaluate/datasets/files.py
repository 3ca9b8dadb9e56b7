"""Reads files of questions and annotations; errors name the file and the row."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava_ray.data.sources import readers
from llava_ray.data.sources.building import LETTER_ANSWER, SHORT_ANSWER
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import open_folder

SHORT = f"\n{SHORT_ANSWER}"
LETTER = f"\n{LETTER_ANSWER}"


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of these files that exists.

    Raises:
        ConfigError: none does.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = f" (or {', '.join(names[1:])})" if names[1:] else ""
    raise ConfigError(
        f"{folder / names[0]} is missing{others}: put the benchmark's files where LLaVA's "
        "docs/Evaluation.md has them, and give the folder above them with --data"
    )


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ConfigError: the file does not exist or is not JSON.
    """
    return readers.read_json(open_folder(str(path.parent)), path.name)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file; empty lines are skipped.

    Raises:
        SampleError: a line is not a JSON object.
    """
    rows = []
    for raw in readers.read_json_lines(open_folder(str(path.parent)), path.name):
        if isinstance(raw.row, SampleError):
            raise raw.row
        rows.append(raw.row)
    return rows


def get_field(row: Any, name: Any, where: str) -> Any:
    """Return a field of a row, or an entry of a table of annotations.

    Raises:
        SampleError: it does not exist.
    """
    try:
        return row[name]
    except (KeyError, TypeError):
        raise SampleError(f"{where} has no {name!r}: is it a file of this task?") from None


def get_text(row: Any, name: str, where: str, *, default: str | None = None) -> str:
    """Return a field of a row as text; numbers are converted.

    Args:
        default: returned if the field is absent or null; None: the field is required.

    Raises:
        SampleError: the field is required and absent, or is neither a text nor a number.
    """
    value = row.get(name) if isinstance(row, dict) else get_field(row, name, where)
    if value is None and default is not None:
        return default
    if value is None:
        get_field(row, name, where)  # raises if it is absent
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SampleError(f"{where}: {name!r} is {str(value)[:80]!r}, and a text is needed")
    return str(value)


def number_repeats(ids: Iterable[object]) -> Iterator[str]:
    """Yield the ids as text; the second occurrence of an id becomes "id#2"."""
    seen: Counter[str] = Counter()
    for each in map(str, ids):
        seen[each] += 1
        yield each if seen[each] == 1 else f"{each}#{seen[each]}"
