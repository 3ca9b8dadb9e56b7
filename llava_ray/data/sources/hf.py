"""Hugging Face datasets: Parquet files, or the Arrow files that `save_to_disk` writes.

Images are columns of bytes or of names (`image_fields`); conversations are in any of the forms that
`conversations` knows.
"""

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from llava_ray.data.sources.building import RawRow, Row
from llava_ray.data.sources.conversations import convert_row
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

_ROWS_AT_ONCE = 16
_ARROW_FILE = b"ARROW1"
"""How Arrow's file format begins; its stream format has no such mark."""


def read_hf(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield the rows of all Parquet and Arrow files of the split (all, by default)."""
    files = [name for name in names if name.endswith((".parquet", ".arrow"))]
    files = [name for name in files if config.split in name]
    if not files:
        raise ConfigError(
            f"there is no .parquet or .arrow of split {config.split or 'any'!r} in "
            f"{folder.address!r}: give the folder of a downloaded dataset"
        )
    for name in files:
        number = 0
        with folder.open(name) as file:
            for batch in _read_batches(file, name):
                for row in batch.to_pylist():
                    where = f"{name}[{number}]"
                    yield RawRow(where, row if row.get("id") is not None else {**row, "id": where})
                    number += 1


def convert_hf(row: Row) -> Sample:
    """Return the sample of a row of a Hugging Face dataset."""
    return convert_row(row, "hf")


def _read_batches(file: IO[bytes], name: str) -> Iterator[pa.RecordBatch]:
    source: Any = file
    try:
        if name.endswith(".parquet"):
            yield from pq.ParquetFile(source).iter_batches(_ROWS_AT_ONCE, use_threads=False)
        elif file.read(len(_ARROW_FILE)) == _ARROW_FILE:
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(source)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{name!r} cannot be read ({error}): download it again") from error
