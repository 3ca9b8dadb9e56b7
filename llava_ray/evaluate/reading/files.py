"""Files of questions and annotations, read with errors that name the file and the row."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError, SampleError

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of these files that is there.

    Raises:
        ConfigError: none is.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"{folder / names[0]} is missing{f' (or {names[1:]})' if names[1:] else ''}: put the "
        "benchmark's files where LLaVA's docs/Evaluation.md has them, and give the folder above "
        "them with --data"
    )


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ConfigError: it is not JSON, or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): get it again") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one on each line; empty lines are left out.

    Raises:
        ConfigError: a line is not a JSON object, or the file cannot be read.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}, is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}, is not a JSON object: {line[:60]!r}")
        rows.append(row)
    return rows


def field(row: dict[str, Any], name: str, where: str) -> Any:
    """Return a field of a row.

    Raises:
        SampleError: the row has none.
    """
    try:
        return row[name]
    except (KeyError, TypeError):
        raise SampleError(f"{where} has no field {name!r}: is it a file of this task?") from None


def number_repeats(ids: Iterable[object]) -> Iterator[str]:
    """Yield the ids as text, the second of the same name as "name#2"."""
    seen: Counter[str] = Counter()
    for each in map(str, ids):
        seen[each] += 1
        yield each if seen[each] == 1 else f"{each}#{seen[each]}"


def list_options(choices: Sequence[str]) -> str:
    """Return the lines "A. ..." of a question's options."""
    return "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))
