"""GQA (Hudson and Manning 2019): train_balanced_questions.json, images images/{id}.jpg.

The questions about one image become one conversation, as in LLaVA's 665k mix.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import SHORT_ANSWER, RawRow, Row, make_sample, make_turns
from llava_ray.data.sources.readers import find_one, read_json_dict
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig


def read_gqa(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each image, with all its questions and short answers."""
    split = config.split or "train_balanced"
    name = find_one(folder, names, f"{split}_questions.json")
    turns: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for _, asked in read_json_dict(folder, name):
        turns[asked["imageId"]].append((asked["question"], asked["answer"]))
    for image_id, found in turns.items():
        yield RawRow(f"{name} image {image_id}", {"id": image_id, "turns": found})


def convert_gqa(row: Row) -> Sample:
    """Return the sample of an image's questions."""
    (question, answer), *others = row["turns"]
    turns = [(f"{question}\n{SHORT_ANSWER}", answer), *others]
    return make_sample("gqa", row["id"], make_turns(turns), f"{row['id']}.jpg")
