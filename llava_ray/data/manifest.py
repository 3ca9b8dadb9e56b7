"""What a folder of shards says about itself: `_manifest.json`, and `_index.parquet` beside it.

The manifest is written last, so a folder without one is an unfinished conversion. The index holds
three small numbers a sample, from which `plan` makes the order of an epoch without reading a shard.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from llava_ray.data.shards import COUNTS
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder, open_folder

MANIFEST = "_manifest.json"
INDEX = "_index.parquet"
FORMAT = 1
"""Of shards, index and manifest together; what reads them refuses another."""


class Shard(BaseModel):
    """One file of samples."""

    model_config = ConfigDict(frozen=True)

    name: str
    num_rows: int
    num_bytes: int
    sha256: str


class Manifest(BaseModel):
    """A finished set of shards.

    Attributes:
        format: of the files; see `FORMAT`.
        version: of the converter.
        settings: of the conversion, all that decides what the shards hold.
        model, template: that `num_tokens` were counted for, if they were.
        num_samples, num_images, num_text_only: in all shards.
        rejects: rows that were left out, by reason.
        digest: of the shards' digests: equal digests, equal samples in the same order.
        shards: in order.
    """

    model_config = ConfigDict(frozen=True)

    format: int
    version: str
    settings: dict[str, Any]
    model: str | None
    template: str | None
    num_samples: int
    num_images: int
    num_text_only: int
    rejects: dict[str, int]
    digest: str
    shards: tuple[Shard, ...]

    @property
    def source(self) -> str:
        """The kind of raw data."""
        return str(self.settings.get("source", ""))

    @property
    def num_rejects(self) -> int:
        """Rows that were left out."""
        return sum(self.rejects.values())


def load_manifest(address: str | Folder) -> Manifest:
    """Return the manifest of a folder of shards.

    Raises:
        ConfigError: there is none, or it is of another format.
    """
    folder = open_folder(address) if isinstance(address, str) else address
    try:
        manifest = Manifest.model_validate_json(folder.read(MANIFEST))
    except OSError as error:
        raise ConfigError(
            f"there is no {MANIFEST} in {folder.address!r}: give a folder that `llava-ray convert` "
            "wrote; if it was stopped, run it again and it goes on"
        ) from error
    except ValidationError as error:
        raise ConfigError(
            f"{MANIFEST} in {folder.address!r} cannot be read ({error.errors()[0]['msg']}): "
            "convert the data again"
        ) from error
    if manifest.format != FORMAT:
        raise ConfigError(
            f"the shards in {folder.address!r} have format {manifest.format}, and this version "
            f"reads {FORMAT}: convert the data again"
        )
    return manifest


def load_index(folder: Folder) -> pa.Table:
    """Return the `COUNTS` of all samples, in the order of the shards."""
    with folder.open(INDEX) as file:
        return pq.read_table(file, columns=list(COUNTS))


def write_index(folder: Folder, tables: Sequence[pa.Table]) -> pa.Table:
    """Write the index; return it."""
    schema = pa.schema([(name, pa.int32()) for name in COUNTS])
    index = pa.concat_tables([schema.empty_table(), *tables])
    with folder.write_beside(INDEX) as path:
        pq.write_table(index, path, compression="zstd")
    return index


def digest_shards(shards: Sequence[Shard]) -> str:
    """Return one digest for several."""
    return hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()
