"""Tables with images in them: Hugging Face datasets (Parquet or Arrow files), WebDataset (tar).

Hugging Face: images under `image` or `images`, as bytes or as names; the conversation under
`conversations` (LLaVA), `messages` (OpenAI), `texts` (user, assistant), `question` and `answer`, or
`text` or `caption`. WebDataset: files of one name belong together, an image and `.txt` or `.json`.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from llava_ray.data.sources.building import RawRow, Row, choose, make_sample, make_turns
from llava_ray.data.sources.coco import REQUESTS
from llava_ray.data.sources.conversations import convert_openai, convert_turns
from llava_ray.data.sources.pairs import ENDINGS
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

_ROWS_AT_ONCE = 16


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
            for batch in _read_batches(file, is_parquet=name.endswith(".parquet")):
                for row in batch.to_pylist():
                    yield RawRow(f"{name}[{number}]", {"id": f"{name}[{number}]", **row})
                    number += 1


def convert_hf(row: Row) -> Sample:
    """Return the sample of a row of a Hugging Face dataset; see the module."""
    return _convert_table_row(row, "hf", _take_images(row))


def read_webdataset(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each group of files in each tar, images as bytes."""
    files = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
    if not files:
        raise ConfigError(
            f"there is no .tar in {folder.address!r}: give the folder that holds them"
        )
    for name in files:
        try:
            with folder.open(name) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
                yield from _read_groups(archive, name)
        except tarfile.TarError as error:
            raise ConfigError(
                f"{name!r} is not a complete tar archive ({error}): download it again"
            ) from error


def convert_webdataset(row: Row) -> Sample:
    """Return the sample of a group of files; see the module."""
    content: Row = json.loads(row["json"]) if "json" in row else {}
    if "txt" in row:
        content.setdefault("text", row["txt"].decode("utf-8", errors="replace"))
    content["id"] = row["id"]
    return _convert_table_row(content, "webdataset", row["images"])


def _convert_table_row(row: Row, source: str, images: list[bytes | str]) -> Sample:
    if row.get("messages"):
        written = convert_openai({"id": row["id"], "messages": row["messages"]})
        return make_sample(source, row["id"], written.messages, *(*images, *written.images))
    if row.get("conversations"):
        written = convert_turns({"id": row["id"]}, row["conversations"], source)
        return make_sample(source, row["id"], written.messages, *images)
    if row.get("texts"):
        turns = [(turn["user"], turn["assistant"]) for turn in row["texts"]]
    elif "question" in row:
        answer = row["answer"] if "answer" in row else row["answers"]
        turns = [(row["question"], answer[0] if isinstance(answer, list) else answer)]
    else:
        text = row["text"] if "text" in row else row["caption"]
        turns = [(REQUESTS[choose(row["id"], len(REQUESTS))], text.strip())]
    return make_sample(source, row["id"], make_turns(turns, num_images=len(images)), *images)


def _take_images(row: Row) -> list[bytes | str]:
    found = row.get("images") or row.get("image") or []
    found = found if isinstance(found, list) else [found]
    return [_take_image(image) for image in found]


def _take_image(image: Any) -> bytes | str:
    if isinstance(image, dict):
        return image["path"] if image.get("bytes") is None else image["bytes"]
    return image


def _read_batches(file: Any, *, is_parquet: bool) -> Iterator[pa.RecordBatch]:
    try:
        if is_parquet:
            yield from pq.ParquetFile(file).iter_batches(_ROWS_AT_ONCE, use_threads=False)
        else:
            yield from pyarrow.ipc.open_stream(file)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"a table cannot be read ({error}): download it again") from error


def _read_groups(archive: tarfile.TarFile, name: str) -> Iterator[RawRow]:
    key, group = "", {}
    for member in archive:
        if not member.isfile():
            continue
        folder, _, file = member.name.rpartition("/")
        stem, _, ending = file.partition(".")
        place = posixpath.join(folder, stem)
        if place != key and group:
            yield RawRow(f"{name} {key}", group)
            group = {}
        key = place
        group = group or {"id": f"{name}/{key}", "images": []}
        reader = archive.extractfile(member)
        assert reader is not None
        if f".{ending.lower().rpartition('.')[2]}" in ENDINGS:
            group["images"].append(reader.read())
        else:
            group[ending.lower()] = reader.read()
    if group:
        yield RawRow(f"{name} {key}", group)
