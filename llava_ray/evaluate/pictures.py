"""A question's pictures -> the bytes of their files, read where the model runs."""

from pathlib import Path
from typing import Any

from llava_ray.errors import ImageError


def load_picture(picture: bytes | str) -> bytes:
    """Return an encoded picture.

    Args:
        picture: the file itself, its path, or "SHARD.parquet#ROW/NUMBER" for a picture in a shard.

    Raises:
        ImageError: there is no such file.
    """
    if isinstance(picture, bytes):
        return picture
    path, mark, place = picture.rpartition("#")
    try:
        if mark and path.endswith(".parquet"):
            row, number = map(int, place.split("/"))
            return _read_row(Path(path), row)[number]["data"]
        return Path(picture).read_bytes()
    except OSError as error:
        raise ImageError(
            f"the picture {picture} cannot be read ({error.strerror or error}): put the "
            "benchmark's pictures there, on every machine that a model runs on"
        ) from error


def _read_row(path: Path, row: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row < num_rows:
                table = file.read_row_group(group, columns=["images"], use_threads=False)
                return table["images"][row].as_py()
            row -= num_rows
    raise OSError(f"{path} has no row {row}")
