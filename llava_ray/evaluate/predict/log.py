"""Reads and appends to logs with one JSON record on each line, from which a run resumes.

A line that a killed process left half written is skipped.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llava_ray.evaluate.output_files import dump_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


def append_log(path: Path, records: Iterable["DataclassInstance"]) -> None:
    """Append records to a log in a single write."""
    lines = [dump_json(asdict(record)) + "\n" for record in records]
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            lines = lines if file.read(1) == b"\n" else ["\n", *lines]  # after a killed writer
        file.write("".join(lines).encode())
        file.flush()


def read_log(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yield the records of a log, oldest first; none if there is no log."""
    if not path.is_file():
        return
    names = {field.name for field in fields(kind)}
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.keys() == names:
                yield kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
