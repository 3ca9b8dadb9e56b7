"""A folder of images, each with its text in a file beside it: `cat.jpg`, `cat.txt`.

The text is learned as the answer to one of LLaVA's requests for a description.
"""

import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import (
    RawRow,
    Row,
    choose,
    make_raw_row,
    make_sample,
    make_turns,
)
from llava_ray.data.sources.conversations import CAPTION_REQUESTS
from llava_ray.data.sources.readers import MAX_TEXT_BYTES, decode_text
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_pairs(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each image; the row of an image without a text has no text either."""
    texts = {posixpath.splitext(name)[0]: name for name in names if name.endswith(".txt")}
    images = [name for name in names if name.lower().endswith(ENDINGS)]
    if not images:
        raise ConfigError(f"there are no images in {folder.address!r}: give their folder")
    for name in images:
        text = texts.get(posixpath.splitext(name)[0])
        yield make_raw_row(name, lambda name=name, text=text: _read_pair(folder, name, text))


def convert_pair(row: Row) -> Sample:
    """Return the sample of an image and its text."""
    if row["text"] is None:
        raise SampleError(
            f"the image {row['image']!r} has no .txt file beside it: add one", reason="bad_row"
        )
    request = CAPTION_REQUESTS[choose(row["image"], len(CAPTION_REQUESTS))]
    messages = make_turns([(request, row["text"].strip())])
    return make_sample("pairs", row["id"], messages, row["image"])


def _read_pair(folder: Folder, name: str, text: str | None) -> Row:
    return {"id": name, "image": name, "text": None if text is None else _read(folder, text)}


def _read(folder: Folder, name: str) -> str:
    try:
        data = folder.read(name, limit=MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise SampleError(f"{name!r} cannot be read ({error})", reason="bad_row") from error
    if len(data) > MAX_TEXT_BYTES:
        raise SampleError(
            f"{name!r} has more than {MAX_TEXT_BYTES:,} bytes: shorten it", reason="too_long"
        )
    return decode_text(data, repr(name))
