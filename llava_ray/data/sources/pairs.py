"""A folder of images, each with its text beside it: `cat.jpg`, `cat.txt`.

The text is learned as the answer to one of LLaVA's requests for a description.
"""

import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import RawRow, Row, choose, make_sample, make_turns
from llava_ray.data.sources.coco import REQUESTS
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_pairs(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each image; one without a text has none in its row."""
    texts = {posixpath.splitext(name)[0]: name for name in names if name.endswith(".txt")}
    images = [name for name in names if name.lower().endswith(ENDINGS)]
    if not images:
        raise ConfigError(f"there are no images in {folder.address!r}: give their folder")
    for name in images:
        row = {"id": name, "image": name}
        if text := texts.get(posixpath.splitext(name)[0]):
            row["text"] = folder.read(text).decode("utf-8", errors="replace")
        yield RawRow(name, row)


def convert_pair(row: Row) -> Sample:
    """Return the sample of an image and its text."""
    request = REQUESTS[choose(row["image"], len(REQUESTS))]
    messages = make_turns([(request, row["text"].strip())])
    return make_sample("pairs", row["id"], messages, row["image"])
