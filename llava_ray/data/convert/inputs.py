"""The input of a conversion: where it is, and by what its state is recognised in the next run.

Rows are recognised by their content; files of images by their sizes and times, which change with
every write. A job whose rows and images are the same as in an earlier run is not repeated.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.records import PendingSample, RejectedRow
from llava_ray.data.sources import find_source
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder, find_input, hash_file, is_below, open_folder
from llava_ray.types import Sample

_MODEL_ENDINGS = (".json", ".jinja", ".model", ".txt")
"""Files of a checkpoint that hold its configuration, tokenizer and template."""
_LOOKUPS_AHEAD = 16
"""Files that are looked up concurrently, because each lookup waits for a disk or a network."""


def open_images(config: ConvertConfig) -> Folder:
    """Return the folder of the images: as configured, or where the source usually has them."""
    if config.images:
        return open_folder(config.images).confine()
    folder, _ = find_input(config.input)
    below = find_source(config.source).images
    if below and folder.has(below):
        return Folder(folder.files, folder.path(below), f"{folder.address}/{below}").confine()
    return folder


def check_places(config: ConvertConfig) -> None:
    """Check that the output is not inside the input, and nothing of the input inside the output.

    Raises:
        ConfigError: the next run would read what this one writes, or `overwrite` remove the input.
    """
    output, given = open_folder(config.output), open_folder(config.input)
    is_file = given.files.isfile(given.root)
    if not is_file and _is_inside(output, given):
        raise ConfigError(
            f"the output {config.output!r} is inside the input {config.input!r}, so the next run "
            "would read it as raw data: choose a folder beside the input"
        )
    for name, folder in (("input", given), ("images", open_folder(config.images or config.input))):
        if _is_inside(folder, output):
            raise ConfigError(
                f"the {name} {folder.address!r} is inside the output {config.output!r}: choose "
                "another folder for the output"
            )


def digest_inputs(config: ConvertConfig) -> str:
    """Return a digest of the states of all files of the input, and of what counts tokens."""
    folder, names = find_input(config.input)
    return _digest([digest_model(config), digest_images(names or folder.list(""), folder)])


def digest_model(config: ConvertConfig) -> str:
    """Return a digest of the files of the checkpoint that decide on counts of tokens, if any."""
    if config.model is None:
        return ""
    from llava_ray.model.checkpoint.locate import find_folder

    folder = find_folder(config.model)
    names = sorted(path for path in folder.iterdir() if path.name.endswith(_MODEL_ENDINGS))
    files = [path for path in names if path.is_file() and not path.name.endswith(".index.json")]
    return _digest(f"{path.name} {hash_file(path)}" for path in files)


def digest_rows(rows: Sequence[PendingSample | RejectedRow], model_digest: str) -> str:
    """Return a digest of the content of rows, inline images included, and of `digest_model`."""
    contents = (
        f"{row.where!r} {digest_sample(row.sample)}"
        if isinstance(row, PendingSample)
        else repr(tuple(row))
        for row in rows
    )
    return _digest(chain([model_digest], contents))


def digest_sample(sample: Sample) -> str:
    """Return a digest of a sample's content, inline images included."""
    images = [i if isinstance(i, str) else hashlib.sha256(i).hexdigest() for i in sample.images]
    return _digest([repr((sample.sample_id, sample.messages, images, sample.source))])


def list_image_names(rows: Sequence[PendingSample | RejectedRow]) -> list[str]:
    """Return the names of the images that rows name, in order."""
    samples = [row.sample for row in rows if isinstance(row, PendingSample)]
    return [image for sample in samples for image in sample.images if isinstance(image, str)]


def digest_images(names: Sequence[str], images: Folder) -> str:
    """Return a digest of the states of files, missing ones included; empty without names."""
    if not names:
        return ""
    with ThreadPoolExecutor(_LOOKUPS_AHEAD) as pool:
        versions = list(pool.map(images.describe_version, names))
    return _digest(repr(pair) for pair in zip(names, versions, strict=True))


def _digest(pieces: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def _is_inside(inner: Folder, outer: Folder) -> bool:
    """Return whether a folder or file is a folder or inside it, with links followed."""
    if inner.is_local and outer.is_local:
        return is_below(os.path.realpath(inner.root), os.path.realpath(outer.root))
    return type(inner.files) is type(outer.files) and is_below(inner.root, outer.root)
