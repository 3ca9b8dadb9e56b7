"""Reads tables with an image in each row (MMBench's TSV), row by row.

Such a file holds hundreds of megabytes of base64. A question stores the byte at which its row
begins, and the process that runs the model reads the image from there.
"""

import base64
import binascii
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llava_ray.errors import ConfigError, ImageError

TableRow = dict[str, str]


def read_rows(path: Path) -> Iterator[tuple[int, TableRow]]:
    """Yield each row with the byte offset at which it begins.

    Raises:
        ConfigError: a row has more or fewer columns than the first line.
    """
    with path.open("rb") as file:
        reader = _split(file)
        names = [name.lstrip("\ufeff") for name in next(reader, [])]
        while True:
            place = file.tell()
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield place, _name_cells(names, cells, path, place)


def read_image(path: Path, place: int) -> bytes:
    """Return the image of the row that begins at a byte.

    Raises:
        ImageError: it is not base64.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        names = [name.lstrip("\ufeff") for name in next(_split(file), [])]
        file.seek(place)
        row = _name_cells(names, next(_split(file), []), path, place)
    try:
        return base64.b64decode(row["image"], validate=True)
    except (binascii.Error, KeyError) as error:
        raise ImageError(
            f"{path}, index {row.get('index')}: there is no image in base64 ({error}): get the "
            "file again"
        ) from error


def _split(file: IO[bytes]) -> Iterator[list[str]]:
    """Yield the cells of each row, and read no line beyond it; quoted cells may span lines."""
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    lines = (line.decode("utf-8") for line in iter(file.readline, b""))
    return csv.reader(lines, delimiter="\t")


def _name_cells(names: list[str], cells: list[str], path: Path, place: int) -> TableRow:
    if len(cells) != len(names):
        raise ConfigError(
            f"{path}, byte {place}: a row has {len(cells)} columns, the first line {len(names)}: "
            "get the file again"
        )
    return dict(zip(names, cells, strict=True))
