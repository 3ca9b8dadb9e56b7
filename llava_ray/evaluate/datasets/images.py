"""Reads the images of a question, in the process that runs the model."""

import hashlib
from functools import lru_cache
from pathlib import Path

from llava_ray.data.shards import ShardReader
from llava_ray.errors import ImageError
from llava_ray.evaluate.datasets import tsv
from llava_ray.storage import open_folder


def load_image(image: str) -> bytes:
    """Return an encoded image.

    Args:
        image: the path of its file; "SHARD.parquet#ROW/NUMBER" for one in a shard;
            "TABLE.tsv#BYTE" for that of the row which begins there.

    Raises:
        ImageError: there is no such image.
    """
    path, _, place = image.rpartition("#")
    try:
        if path.endswith(".parquet"):
            row, number = map(int, place.split("/"))
            return _read_row(path, row)[number]
        if path.endswith(".tsv"):
            return tsv.read_image(Path(path), int(place))
        return Path(image).read_bytes()
    except (OSError, ValueError, IndexError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageError(
            f"the image {image} cannot be read ({reason}): put the benchmark's images there, on "
            "every machine that a model runs on"
        ) from error


def hash_image(image: str) -> str:
    """Return the SHA-256 of an encoded image; it is kept until the image's file changes.

    Raises:
        ImageError: there is no such image.
    """
    return _hash(image, _get_version(image))


@lru_cache(maxsize=100_000)
def _hash(image: str, version: tuple[int, int]) -> str:
    return hashlib.sha256(load_image(image)).hexdigest()


def _get_version(image: str) -> tuple[int, int]:
    """Return the size and time of the file that holds an image; zeros if it is not a local one."""
    path, _, _ = image.rpartition("#")
    try:
        found = Path(path if path.endswith((".parquet", ".tsv")) else image).stat()
    except (OSError, ValueError):  # reading it says what is wrong
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _read_row(path: str, row: int) -> list[bytes]:
    sample = _open_shard(path, _get_version(f"{path}#")).read(row).sample
    return [image for image in sample.images if isinstance(image, bytes)]


@lru_cache(maxsize=8)
def _open_shard(path: str, version: tuple[int, int]) -> ShardReader:
    folder, _, name = path.rpartition("/")
    return ShardReader(open_folder(folder or "."), name)
