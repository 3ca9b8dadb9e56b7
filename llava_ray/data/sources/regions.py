"""Parts of photographs and what they are called: RefCOCO and Visual Genome.

As in LLaVA's 665k mix: a conversation an image, each turn from a box to its words or back, at most
ten turns. RefCOCO: `refs(*).p` and instances.json; Visual Genome: region_descriptions.json and
image_data.json, images VG_100K/{id}.jpg and VG_100K_2/{id}.jpg.
"""

import io
import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llava_ray.data.sources.building import (
    REGION_TO_TEXT,
    TEXT_TO_REGION,
    RawRow,
    Row,
    choose,
    make_sample,
    make_turns,
    write_box,
)
from llava_ray.data.sources.readers import find_one, read_json, read_json_list
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

MAX_TURNS = 10


def read_refcoco(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each ten references to parts of one image."""
    split = config.split or "train"
    files = [name for name in names if name.rpartition("/")[2].startswith("refs(")]
    name = find_one(folder, files, "refs(unc).p", "refs(umd).p", "refs(google).p")
    instances = read_json(folder, find_one(folder, names, "instances.json"))
    boxes = {found["id"]: found["bbox"] for found in instances["annotations"]}
    entries = {entry["id"]: entry for entry in instances["images"]}
    by_image: defaultdict[int, list[Row]] = defaultdict(list)
    for ref in _load_plain_pickle(folder, name):
        if ref["split"] == split:
            region = {"text": ref["sentences"][0]["sent"], "box": boxes.get(ref["ann_id"])}
            by_image[ref["image_id"]].append(region)
    for image_id, regions in by_image.items():
        for part, first in enumerate(range(0, len(regions), MAX_TURNS)):
            row = {
                "id": f"{image_id}-{part}",
                "entry": entries.get(image_id, {}),
                "regions": regions[first : first + MAX_TURNS],
            }
            yield RawRow(f"{name} image {image_id}", row)


def convert_refcoco(row: Row) -> Sample:
    """Return the sample of references to parts of an image."""
    entry = row["entry"]
    image = f"train2014/{entry['file_name']}"
    return _convert_regions("refcoco", row, (entry["width"], entry["height"]), image)


def read_vg(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each image, with at most ten of its regions, drawn by its id."""
    data = read_json(folder, find_one(folder, names, "image_data.json"))
    entries = {entry["image_id"]: entry for entry in data}
    for raw in read_json_list(folder, find_one(folder, names, "region_descriptions.json")):
        assert isinstance(raw.row, dict)
        image_id = raw.row["id"]
        drawn = sorted(raw.row["regions"], key=lambda r: choose(f"{r['region_id']}", 1 << 32))
        regions = [
            {"text": r["phrase"].strip(), "box": [r["x"], r["y"], r["width"], r["height"]]}
            for r in drawn[:MAX_TURNS]
        ]
        row = {"id": image_id, "entry": entries.get(image_id, {}), "regions": regions}
        yield RawRow(raw.where, row)


def convert_vg(row: Row) -> Sample:
    """Return the sample of regions of a Visual Genome image."""
    entry = row["entry"]
    folder, name = entry["url"].split("/")[-2:]
    return _convert_regions("vg", row, (entry["width"], entry["height"]), f"{folder}/{name}")


def _convert_regions(source: str, row: Row, size: tuple[int, int], image: str) -> Sample:
    """Return a conversation about regions; each asks for words or a box, by a digest of both."""
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
    """Reads texts, numbers, lists and dictionaries, and nothing that would run code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it holds {module_name}.{global_name}")


def _load_plain_pickle(folder: Folder, name: str) -> Sequence[Row]:
    try:
        return _PlainUnpickler(io.BytesIO(folder.read(name)), encoding="latin-1").load()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ConfigError(
            f"{name!r} is no pickle of plain data ({error}): fetch it again"
        ) from None
