"""GQA (Hudson and Manning 2019): train_balanced_questions.json, images images/{id}.jpg.

All questions about an image become one conversation, as in LLaVA's 665k mixture.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import (
    SHORT_ANSWER,
    RawRow,
    Row,
    make_raw_row,
    make_sample,
    make_turns,
    read_text,
)
from llava_ray.data.sources.readers import find_one, read_json_dict
from llava_ray.errors import SampleError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig


def read_gqa(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each image, with all its questions and short answers."""
    split = config.split or "train_balanced"
    name = find_one(folder, names, f"{split}_questions.json")
    turns: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for key, raw in read_json_dict(folder, name):
        found = make_raw_row(raw.where, lambda key=key, raw=raw: _read_question(key, raw))
        if isinstance(found.row, SampleError):
            yield found
        else:
            turns[found.row["image_id"]].append(found.row["turn"])
    for image_id, asked in turns.items():
        yield RawRow(f"{name} image {image_id}", {"id": image_id, "turns": asked})


def convert_gqa(row: Row) -> Sample:
    """Return the sample of an image's questions."""
    (question, answer), *others = row["turns"]
    turns = [(f"{question}\n{SHORT_ANSWER}", answer), *others]
    return make_sample("gqa", row["id"], make_turns(turns), f"{row['id']}.jpg")


def _read_question(key: str, raw: RawRow) -> Row:
    row = raw.get()
    turn = (
        read_text(row["question"], f"the question {key}"),
        read_text(row["answer"], f"the answer to {key}"),
    )
    return {"image_id": read_text(row["imageId"], f"the imageId of {key}"), "turn": turn}
