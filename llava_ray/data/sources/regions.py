"""Regions of photographs and their descriptions: RefCOCO and Visual Genome.

As in LLaVA's 665k mixture: one conversation per image, in which each turn goes from a box to its
description or back, with at most ten turns. RefCOCO: `refs(*).p` and instances.json; Visual Genome:
region_descriptions.json and image_data.json, images VG_100K/{id}.jpg and VG_100K_2/{id}.jpg.
"""

import io
import pickle
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_ray.data.sources.building import (
    BROKEN_ROW,
    REGION_TO_TEXT,
    TEXT_TO_REGION,
    RawRow,
    Row,
    choose,
    describe,
    index_rows,
    make_raw_row,
    make_sample,
    make_turns,
    read_text,
    write_box,
)
from llava_ray.data.sources.readers import find_one, read_json, read_json_list, read_json_object
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

MAX_TURNS = 10


def read_refcoco(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each ten references to regions of one image."""
    split = config.split or "train"
    files = [name for name in names if name.rpartition("/")[2].startswith("refs(")]
    name = find_one(folder, files, "refs(unc).p", "refs(umd).p", "refs(google).p")
    instances = find_one(folder, names, "instances.json")
    content = read_json_object(folder, instances, annotations=list, images=list)
    boxes, rejects = index_rows(f"{instances} annotations", content["annotations"], "id")
    yield from rejects
    entries, rejects = index_rows(f"{instances} images", content["images"], "id")
    yield from rejects
    by_image: defaultdict[int, list[Row]] = defaultdict(list)
    for i, ref in enumerate(_load_plain_pickle(folder, name)):
        found = make_raw_row(f"{name}[{i}]", lambda ref=ref: _read_reference(ref, boxes))
        if isinstance(found.row, SampleError):
            yield found
        elif found.row["split"] == split:
            by_image[found.row["image_id"]].append(found.row)
    for image_id, regions in by_image.items():
        for part, first in enumerate(range(0, len(regions), MAX_TURNS)):
            row = {
                "id": f"{image_id}-{part}",
                "entry": entries.get(image_id, {}),
                "regions": regions[first : first + MAX_TURNS],
            }
            yield RawRow(f"{name} image {image_id}", row)


def convert_refcoco(row: Row) -> Sample:
    """Return the sample of references to regions of an image."""
    entry = row["entry"]
    image = f"train2014/{read_text(entry['file_name'], 'file_name')}"
    return _convert_regions("refcoco", row, (entry["width"], entry["height"]), image)


def read_vg(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each image, with at most ten of its regions, drawn by their ids."""
    name = find_one(folder, names, "image_data.json")
    content = read_json(folder, name)
    if not isinstance(content, list):
        raise ConfigError(f"{name!r} holds {describe(content)}, not a list of images")
    entries, rejects = index_rows(name, content, "image_id")
    yield from rejects
    for raw in read_json_list(folder, find_one(folder, names, "region_descriptions.json")):
        yield make_raw_row(raw.where, lambda raw=raw: _draw_regions(raw.get(), entries))


def convert_vg(row: Row) -> Sample:
    """Return the sample of regions of a Visual Genome image."""
    entry = row["entry"]
    folder, name = entry["url"].split("/")[-2:]
    return _convert_regions("vg", row, (entry["width"], entry["height"]), f"{folder}/{name}")


def _read_reference(ref: Row, boxes: dict[Any, Row]) -> Row:
    if not isinstance(ref["image_id"], int | str):
        raise SampleError(f"image_id is {describe(ref['image_id'])}", reason="bad_row")
    return {
        "split": ref["split"],
        "image_id": ref["image_id"],
        "text": read_text(ref["sentences"][0]["sent"], "the sentence"),
        "box": boxes.get(ref["ann_id"], {}).get("bbox"),
    }


def _draw_regions(row: Row, entries: dict[Any, Row]) -> Row:
    drawn = sorted(row["regions"], key=lambda r: choose(f"{r['region_id']}", 1 << 32))
    regions = [
        {
            "text": read_text(r["phrase"], "the phrase").strip(),
            "box": [r["x"], r["y"], r["width"], r["height"]],
        }
        for r in drawn[:MAX_TURNS]
    ]
    return {"id": row["id"], "entry": entries.get(row["id"], {}), "regions": regions}


def _convert_regions(source: str, row: Row, size: tuple[int, int], image: str) -> Sample:
    """Return a conversation about regions; a digest decides which way each turn goes."""
    turns: list[tuple[str, str]] = []
    for region in row["regions"]:
        x, y, width, height = region["box"]
        box, text = write_box(x, y, width, height, size=size), region["text"]
        if choose(f"{row['id']} {text} {box}", 2):
            turns.append((REGION_TO_TEXT.format(box), text))
        else:
            turns.append((TEXT_TO_REGION.format(text), box))
    return make_sample(source, row["id"], make_turns(turns), image)


class _PlainUnpickler(pickle.Unpickler):
    """Reads texts, numbers, lists and dictionaries, and nothing that could run code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it holds {module_name}.{global_name}")


def _load_plain_pickle(folder: Folder, name: str) -> list[Any]:
    try:
        content = _PlainUnpickler(io.BytesIO(folder.read(name)), encoding="latin-1").load()
    except (pickle.UnpicklingError, EOFError, MemoryError, *BROKEN_ROW) as error:
        raise ConfigError(
            f"{name!r} is not a pickle of plain data ({error}): download it again"
        ) from None
    if not isinstance(content, list):
        raise ConfigError(f"{name!r} holds {describe(content)}, not a list of references")
    return content
