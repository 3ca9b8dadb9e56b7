"""The manifest (`_manifest.json`) and index (`_index.parquet`) of a folder of shards.

The manifest is written last, so a folder without one is an unfinished conversion. The index holds
three integers per sample, from which `loader.order` computes an epoch without reading a shard.
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
"""Version of shards, index and manifest together; readers refuse any other."""


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
        format: version of the files; see `FORMAT`.
        version: version of llava_ray that converted the data.
        settings: every setting of the conversion that determines what the shards hold.
        model, template: what `num_tokens` was counted for; None if tokens were not counted.
        num_samples, num_images, num_text_only: totals over all shards.
        rejects: number of rows that were left out, by reason.
        digest: hash of the shards' hashes; equal digests mean the same samples in the same order.
        shards: the files, in order.
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
        """The name of the source that was converted."""
        return str(self.settings.get("source", ""))

    @property
    def num_rejects(self) -> int:
        """The number of rows that were left out."""
        return sum(self.rejects.values())


def load_manifest(address: str | Folder) -> Manifest:
    """Return the manifest of a folder of shards.

    Raises:
        ConfigError: there is none, or its format is another.
    """
    folder = open_folder(address) if isinstance(address, str) else address
    try:
        manifest = Manifest.model_validate_json(folder.read(MANIFEST))
    except OSError as error:
        raise ConfigError(
            f"there is no {MANIFEST} in {folder.address!r}: give a folder that `llava-ray convert` "
            "wrote; if it was interrupted, run the same command again and it resumes"
        ) from error
    except ValidationError as error:
        raise ConfigError(
            f"{MANIFEST} in {folder.address!r} cannot be read ({error.errors()[0]['msg']}): "
            "run the conversion again"
        ) from error
    if manifest.format != FORMAT:
        raise ConfigError(
            f"the shards in {folder.address!r} have format {manifest.format}, and this version "
            f"reads format {FORMAT}: run the conversion again"
        )
    return manifest


def load_index(folder: Folder) -> pa.Table:
    """Return the `COUNTS` of all samples, in the order of the shards."""
    with folder.open(INDEX) as file:
        return pq.read_table(file, columns=list(COUNTS))


def write_index(folder: Folder, tables: Sequence[pa.Table]) -> pa.Table:
    """Write the index and return it."""
    schema = pa.schema([(name, pa.int32()) for name in COUNTS])
    index = pa.concat_tables([schema.empty_table(), *tables])
    with folder.write_beside(INDEX) as path:
        pq.write_table(index, path, compression="zstd")
    return index


def digest_shards(shards: Sequence[Shard]) -> str:
    """Return one digest of all shards' digests."""
    return hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()
