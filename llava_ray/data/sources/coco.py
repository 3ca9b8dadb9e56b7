"""COCO (Lin et al. 2014): captions_*.json and instances_*.json, images in train2017/ or the like.

`pretrain` (the default) gives one sample a caption, asked for in one of LLaVA's eleven ways (the
template "plain" leaves the question out). `instruct` gives one conversation an image: a caption,
then the box of each kind of thing that is there exactly once.
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
    make_sample,
    make_turns,
    write_box,
)
from llava_ray.data.sources.readers import find_one, read_json
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

FORMATS = ("pretrain", "instruct")
REQUESTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""LLaVA (Liu et al. 2023), table 11."""


def read_coco(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each caption, or for each image with captions and boxes."""
    wanted, split = config.prompt_format or FORMATS[0], config.split or "train2017"
    if wanted not in FORMATS:
        raise ConfigError(f"prompt_format={wanted!r}: for COCO, choose {' or '.join(FORMATS)}")
    name = find_one(folder, names, f"captions_{split}.json")
    captions = read_json(folder, name)
    entries = {image["id"]: image for image in captions["images"]}
    if wanted == "pretrain":
        for i, caption in enumerate(captions["annotations"]):
            entry = entries.get(caption["image_id"], {})
            yield RawRow(
                f"{name} annotations[{i}]", {"split": split, "entry": entry, "caption": caption}
            )
        return
    by_image: defaultdict[int, list[Row]] = defaultdict(list)
    for caption in captions["annotations"]:
        by_image[caption["image_id"]].append(caption)
    boxes = _read_boxes(folder, names, split)
    for i, entry in enumerate(captions["images"]):
        found = sorted(by_image[entry["id"]], key=lambda caption: caption["id"])
        row = {"split": split, "entry": entry, "captions": found, "boxes": boxes[entry["id"]]}
        yield RawRow(f"{name} images[{i}]", row)


def convert_coco(row: Row) -> Sample:
    """Return the sample of a caption, or of an image with captions and boxes."""
    entry = row["entry"]
    image = f"{row['split']}/{entry['file_name']}"
    if "caption" in row:
        sample_id, text = row["caption"]["id"], row["caption"]["caption"].strip()
        request = REQUESTS[choose(str(sample_id), len(REQUESTS))]
        return make_sample("coco", sample_id, make_turns([(request, text)]), image)
    size = (entry["width"], entry["height"])
    turns = [(ONE_SENTENCE, row["captions"][0]["caption"].strip())]
    counts = Counter(box["name"] for box in row["boxes"])
    for box in row["boxes"]:
        if counts[box["name"]] == 1 and not box["iscrowd"]:
            question = TEXT_TO_REGION.format(f"the {box['name']}")
            turns.append((question, write_box(*box["bbox"], size=size)))
    return make_sample("coco", entry["id"], make_turns(turns), image)


def _read_boxes(folder: Folder, names: list[str], split: str) -> defaultdict[int, list[Row]]:
    """Return the boxes in each image, with the names of what they are of."""
    instances: dict[str, Any] = read_json(
        folder, find_one(folder, names, f"instances_{split}.json")
    )
    kinds = {category["id"]: category["name"] for category in instances["categories"]}
    boxes: defaultdict[int, list[Row]] = defaultdict(list)
    for found in instances["annotations"]:
        box = {"name": kinds[found["category_id"]], "bbox": found["bbox"]}
        boxes[found["image_id"]].append({**box, "iscrowd": found.get("iscrowd", 0)})
    return boxes
