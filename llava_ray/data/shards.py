"""Shards: Parquet files of samples, with images stored as received.

Written by `convert` and read row by row by `loader.stream`. Row groups hold about one megabyte,
because reading a row means reading its row group. All columns are compressed with zstd except the
images, which are compressed already.
"""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llava_ray.data.validate import CheckedImage
from llava_ray.storage import Folder, hash_file
from llava_ray.template import IMAGE_TOKEN
from llava_ray.types import IMAGE, ImagePart, Message, Sample, TextPart

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        (
            "images",
            pa.list_(
                pa.struct(
                    [
                        ("data", pa.binary()),
                        ("width", pa.int32()),
                        ("height", pa.int32()),
                        ("sha256", pa.string()),
                    ]
                )
            ),
        ),
        ("num_images", pa.int32()),
        ("num_words", pa.int32()),
        ("num_tokens", pa.int32()),
    ]
)
"""One row per sample. `text` has `<image>` for each image; `num_words` is the length that LLaVA's
sampler groups by; `num_tokens` is the length of the encoded sample for the manifest's model, or
null if tokens were not counted.
"""

COUNTS = ("num_images", "num_words", "num_tokens")
MAX_GROUP_BYTES = 1 << 20
MAX_GROUP_ROWS = 64
_COLUMNS = ["id", "source", "messages", "images"]


class ShardFile(NamedTuple):
    """A finished shard: its number of rows, its size in bytes and its SHA-256."""

    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRow:
    """A sample as it is stored in a shard.

    Attributes:
        sample: the sample; its images are bytes.
        image_sizes: width and height of each image in pixels, after EXIF rotation.
    """

    sample: Sample
    image_sizes: tuple[tuple[int, int], ...]


class ShardWriter:
    """Writes one shard to a path; holds at most one row group in memory.

    As a context manager it abandons the file if the block ends with an error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        compression: Any = dict.fromkeys(
            _list_leaves(), "zstd"
        )  # pyarrow's stubs accept a single codec only
        compression["images.list.element.data"] = "none"
        self._writer = pq.ParquetWriter(path, SCHEMA, compression=compression, use_dictionary=False)
        self._rows: list[dict[str, Any]] = []
        self._held_bytes = self._num_rows = 0

    def add(
        self, sample: Sample, images: Sequence[CheckedImage], *, num_tokens: int | None
    ) -> None:
        """Append a sample with its images."""
        row = describe_row(sample, images, num_tokens=num_tokens)
        self._rows.append(row)
        self._num_rows += 1
        self._held_bytes += sum(len(image.data) for image in images)
        self._held_bytes += sum(len(message["text"]) for message in row["messages"])
        if self._held_bytes >= MAX_GROUP_BYTES or len(self._rows) >= MAX_GROUP_ROWS:
            self._flush()

    def close(self) -> ShardFile:
        """Write the remaining rows and close the file."""
        self._flush()
        self._writer.close()
        return ShardFile(self._num_rows, self._path.stat().st_size, hash_file(self._path))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer.is_open = False  # or pyarrow closes it again when it is collected

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows, self._held_bytes = [], 0


class ShardReader:
    """Reads single rows of a shard; each read loads one row group. Threads may share a reader."""

    def __init__(self, folder: Folder, name: str) -> None:
        # With a memory map, an image is copied only once, when it is read.
        where = folder.path(name) if folder.is_local else folder.open(name)
        self._file = pq.ParquetFile(
            where, memory_map=folder.is_local, pre_buffer=not folder.is_local
        )
        self._lock = threading.Lock()  # pyarrow forbids two reads of one ParquetFile at a time
        self._ends: list[int] = []
        end = 0
        for i in range(self._file.num_row_groups):
            end += self._file.metadata.row_group(i).num_rows
            self._ends.append(end)

    def read(self, row: int) -> ShardRow:
        """Return the sample in a row, counted from 0."""
        group = bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        return parse_row(self._read_group(group).slice(row - first, 1).to_pylist()[0])

    def rows(self) -> Iterator[ShardRow]:
        """Yield all samples in order."""
        for group in range(len(self._ends)):
            yield from (parse_row(row) for row in self._read_group(group).to_pylist())

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close(force=True)

    def _read_group(self, group: int) -> pa.Table:
        with self._lock:
            return self._file.read_row_group(group, columns=_COLUMNS, use_threads=False)


def read_counts(folder: Folder, name: str) -> pa.Table:
    """Return the `COUNTS` columns of a shard, without reading texts or images."""
    with folder.open(name) as file:
        return pq.read_table(file, columns=list(COUNTS))


def describe_row(
    sample: Sample, images: Sequence[CheckedImage], *, num_tokens: int | None
) -> dict[str, Any]:
    """Return a sample as a row of `SCHEMA`."""
    messages = [{"role": m.role, "text": write_text(m)} for m in sample.messages]
    return {
        "id": sample.sample_id,
        "source": sample.source,
        "messages": messages,
        "images": [
            {
                "data": image.data,
                "width": image.width,
                "height": image.height,
                "sha256": hashlib.sha256(image.data).hexdigest(),
            }
            for image in images
        ],
        "num_images": len(images),
        "num_words": sum(_count_words(message) for message in sample.messages),
        "num_tokens": num_tokens,
    }


def parse_row(row: dict[str, Any]) -> ShardRow:
    """Return the sample in a row of `SCHEMA`; the inverse of `describe_row`."""
    messages = tuple(Message(m["role"], _parse_text(m["text"])) for m in row["messages"])
    images = row["images"]
    sample = Sample(row["id"], messages, tuple(i["data"] for i in images), row["source"])
    return ShardRow(sample, tuple((i["width"], i["height"]) for i in images))


def write_text(message: Message) -> str:
    """Return a message's text, with `<image>` for each image."""
    pieces = [p.text if isinstance(p, TextPart) else IMAGE_TOKEN for p in message.parts]
    return "".join(pieces)


def _count_words(message: Message) -> int:
    """Return the number of words in a message; an image counts as one, as in LLaVA's sampler."""
    return sum(len(p.text.split()) if isinstance(p, TextPart) else 1 for p in message.parts)


def _parse_text(text: str) -> tuple[TextPart | ImagePart, ...]:
    parts: list[TextPart | ImagePart] = []
    for i, piece in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            parts.append(IMAGE)
        if piece:
            parts.append(TextPart(piece))
    return tuple(parts)


def _list_leaves() -> list[str]:
    """Return the full Parquet names of the columns of `SCHEMA`, nested ones included."""
    names: list[str] = []
    for field in SCHEMA:
        if pa.types.is_list(field.type):
            inner = field.type.value_type
            names += [f"{field.name}.list.element.{leaf.name}" for leaf in inner]
        else:
            names.append(field.name)
    return names
