"""The supported raw data formats: each has a reader of rows and a pure converter to `Sample`.

To add a source, write its converter, write a reader if no existing one fits, and add a line to
`SOURCES`.
"""

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from llava_ray.data.sources.building import RawRow, Row
from llava_ray.data.sources.coco import convert_coco, read_coco
from llava_ray.data.sources.conversations import (
    convert_llava,
    convert_openai,
    convert_sharegpt,
    read_conversations,
)
from llava_ray.data.sources.gqa import convert_gqa, read_gqa
from llava_ray.data.sources.hf import convert_hf, read_hf
from llava_ray.data.sources.pairs import convert_pair, read_pairs
from llava_ray.data.sources.regions import (
    convert_refcoco,
    convert_vg,
    read_refcoco,
    read_vg,
)
from llava_ray.data.sources.scienceqa import convert_scienceqa, read_scienceqa
from llava_ray.data.sources.text_in_images import (
    convert_ocrvqa,
    convert_textcaps,
    convert_textvqa,
    read_ocrvqa,
    read_textcaps,
    read_textvqa,
)
from llava_ray.data.sources.vqa import convert_vqa, read_vqa
from llava_ray.data.sources.webdataset import convert_webdataset, read_webdataset
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig


class Source(NamedTuple):
    """A raw data format.

    Attributes:
        read: yields the rows of a folder, given the names of the files in it.
        convert: turns a row into a sample.
        images: the subfolder that the names of images are relative to.
        options: the settings that only some sources use: split, prompt_format.
    """

    read: Callable[[Folder, list[str], "ConvertConfig"], Iterator[RawRow]]
    convert: Callable[[Row], Sample]
    images: str = ""
    options: tuple[str, ...] = ()


_SPLIT = ("split",)
_SPLIT_AND_FORMAT = ("split", "prompt_format")

SOURCES = {
    "llava": Source(read_conversations, convert_llava),
    "sharegpt": Source(read_conversations, convert_sharegpt),
    "openai": Source(read_conversations, convert_openai),
    "pairs": Source(read_pairs, convert_pair),
    "scienceqa": Source(read_scienceqa, convert_scienceqa, "images", _SPLIT_AND_FORMAT),
    "coco": Source(read_coco, convert_coco, options=_SPLIT_AND_FORMAT),
    "vqa": Source(read_vqa, convert_vqa, options=_SPLIT),
    "gqa": Source(read_gqa, convert_gqa, "images", _SPLIT),
    "textvqa": Source(read_textvqa, convert_textvqa, options=_SPLIT),
    "textcaps": Source(read_textcaps, convert_textcaps, options=_SPLIT),
    "ocrvqa": Source(read_ocrvqa, convert_ocrvqa, "images", _SPLIT),
    "refcoco": Source(read_refcoco, convert_refcoco, options=_SPLIT),
    "vg": Source(read_vg, convert_vg),
    "hf": Source(read_hf, convert_hf, options=_SPLIT),
    "webdataset": Source(read_webdataset, convert_webdataset),
}


def find_source(name: str) -> Source:
    """Return the source with this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(SOURCES)}"
        raise ConfigError(f"unknown source {name!r}: {hint}")
    return SOURCES[name]


def check_options(config: "ConvertConfig") -> None:
    """Check that the source uses the settings that are given.

    Raises:
        ConfigError: it does not, so the data would be other than was asked for.
    """
    for name in _SPLIT_AND_FORMAT:
        if getattr(config, name) and name not in find_source(config.source).options:
            users = ", ".join(key for key, source in SOURCES.items() if name in source.options)
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no effect on the source {config.source}, "
                f"only on {users}: leave it out"
            )
