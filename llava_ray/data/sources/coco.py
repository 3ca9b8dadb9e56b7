"""COCO (Lin et al. 2014): captions_*.json and instances_*.json, images in train2017/ or the like.

`pretrain` (the default) gives one sample per caption, asked for with one of LLaVA's eleven requests
(the template "plain" leaves the request out). `instruct` gives one conversation per image: a
caption, then the box of each kind of object that is there exactly once.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_ray.data.sources.building import (
    ONE_SENTENCE,
    TEXT_TO_REGION,
    RawRow,
    Row,
    choose,
    group_rows,
    index_rows,
    make_raw_row,
    make_sample,
    make_turns,
    read_text,
    write_box,
)
from llava_ray.data.sources.conversations import CAPTION_REQUESTS
from llava_ray.data.sources.readers import find_one, read_json_object
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

FORMATS = ("pretrain", "instruct")


def read_coco(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each caption, or for each image with its captions and boxes."""
    wanted, split = config.prompt_format or FORMATS[0], config.split or "train2017"
    if wanted not in FORMATS:
        raise ConfigError(f"prompt_format={wanted!r}: for COCO, choose {' or '.join(FORMATS)}")
    name = find_one(folder, names, f"captions_{split}.json")
    content = read_json_object(folder, name, images=list, annotations=list)
    entries, rejects = index_rows(f"{name} images", content["images"], "id")
    yield from rejects
    if wanted == "pretrain":
        for i, caption in enumerate(content["annotations"]):
            yield make_raw_row(
                f"{name} annotations[{i}]",
                lambda caption=caption: {
                    "split": split,
                    "entry": entries[caption["image_id"]],
                    "caption": caption,
                },
            )
        return
    captions, rejects = group_rows(f"{name} annotations", content["annotations"], "image_id")
    yield from rejects
    boxes, rejects = _read_boxes(folder, names, split)
    yield from rejects
    for key, entry in entries.items():
        row = {"split": split, "entry": entry, "captions": captions[key], "boxes": boxes[key]}
        yield RawRow(f"{name} image {key}", row)


def convert_coco(row: Row) -> Sample:
    """Return the sample of a caption, or of an image with captions and boxes."""
    entry = row["entry"]
    image = f"{row['split']}/{read_text(entry['file_name'], 'file_name')}"
    if "caption" in row:
        sample_id, text = row["caption"]["id"], _read_caption(row["caption"])
        request = CAPTION_REQUESTS[choose(str(sample_id), len(CAPTION_REQUESTS))]
        return make_sample("coco", sample_id, make_turns([(request, text)]), image)
    size = (entry["width"], entry["height"])
    captions = sorted(row["captions"], key=lambda caption: caption["id"])
    turns = [(ONE_SENTENCE, _read_caption(captions[0]))]
    counts = Counter(box["name"] for box in row["boxes"])
    for box in row["boxes"]:
        if counts[box["name"]] == 1 and not box["iscrowd"]:
            question = TEXT_TO_REGION.format(f"the {box['name']}")
            turns.append((question, write_box(*box["bbox"], size=size)))
    return make_sample("coco", entry["id"], make_turns(turns), image)


def _read_caption(caption: Row) -> str:
    return read_text(caption["caption"], "the caption").strip()


def _read_boxes(
    folder: Folder, names: list[str], split: str
) -> tuple[defaultdict[Any, list[Row]], list[RawRow]]:
    """Return the boxes in each image with the names of their objects, and the rejected boxes."""
    name = find_one(folder, names, f"instances_{split}.json")
    content = read_json_object(folder, name, annotations=list, categories=list)
    kinds, rejects = index_rows(f"{name} categories", content["categories"], "id")
    groups, more = group_rows(f"{name} annotations", content["annotations"], "image_id")
    rejects += more
    boxes: defaultdict[Any, list[Row]] = defaultdict(list)
    for image_id, found in groups.items():
        for box in found:
            made = make_raw_row(f"{name} image {image_id}", lambda box=box: _read_box(box, kinds))
            if isinstance(made.row, SampleError):
                rejects.append(made)
            else:
                boxes[image_id].append(made.row)
    return boxes, rejects


def _read_box(box: Row, kinds: dict[Any, Row]) -> Row:
    name = read_text(kinds[box["category_id"]]["name"], "the name of a category")
    left, top, width, height = (edge + 0 for edge in box["bbox"])
    is_crowd = box.get("iscrowd", 0)
    return {"name": name, "bbox": [left, top, width, height], "iscrowd": is_crowd}
