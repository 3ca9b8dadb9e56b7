"""Images with text in them: TextVQA, TextCaps, OCR-VQA.

TextVQA and TextCaps (Singh et al. 2019, Sidorov et al. 2020) come as `{"data": [...]}`, with
images train_images/{image_id}.jpg. What an OCR system read (TextVQA_Rosetta_OCR_*.json) is
written into the question, if the file is there. Of TextCaps each image gives one caption. OCR-VQA
(Mishra et al. 2019) comes as dataset.json, with images images/{id}.jpg; its splits 1, 2 and 3 are
train, val and test.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import (
    ONE_SENTENCE,
    SHORT_ANSWER,
    RawRow,
    Row,
    make_sample,
    make_turns,
    most_frequent,
)
from llava_ray.data.sources.readers import find_one, read_json_dict, read_json_list
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

OCR_VQA_SPLITS = {"train": 1, "val": 2, "test": 3}


def read_textvqa(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each question, with the words that were read in its image."""
    split = config.split or "train"
    name = find_one(folder, names, *(f"TextVQA_{v}_{split}.json" for v in ("0.5.1", "0.5")))
    words = _read_words(folder, names, split)
    for raw in read_json_list(folder, name, "data.item"):
        assert isinstance(raw.row, dict)
        yield RawRow(raw.where, {**raw.row, "words": words.get(raw.row.get("image_id", ""), [])})


def convert_textvqa(row: Row) -> Sample:
    """Return the sample of a question about the text in an image."""
    question = f"{row['question']}{_write_words(row)}\n{SHORT_ANSWER}"
    turns = [(question, most_frequent(row["answers"]))]
    return make_sample("textvqa", row["question_id"], make_turns(turns), _name_image(row))


def read_textcaps(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for the first caption of each image."""
    split = config.split or "train"
    name = find_one(folder, names, f"TextCaps_0.1_{split}.json")
    words = _read_words(folder, names, split)
    seen: set[str] = set()
    for raw in read_json_list(folder, name, "data.item"):
        assert isinstance(raw.row, dict)
        image_id = raw.row.get("image_id", "")
        if image_id not in seen:
            seen.add(image_id)
            yield RawRow(raw.where, {**raw.row, "words": words.get(image_id, [])})


def convert_textcaps(row: Row) -> Sample:
    """Return the sample of a caption."""
    turns = [(f"{ONE_SENTENCE}{_write_words(row)}", row["caption_str"].strip())]
    return make_sample("textcaps", row["image_id"], make_turns(turns), _name_image(row))


def read_ocrvqa(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each book cover of the split."""
    split = config.split or "train"
    if split not in OCR_VQA_SPLITS:
        raise ConfigError(f"split={split!r}: OCR-VQA has {', '.join(OCR_VQA_SPLITS)}")
    name = find_one(folder, names, "dataset.json")
    for key, row in read_json_dict(folder, name):
        if row.get("split") == OCR_VQA_SPLITS[split]:
            yield RawRow(f"{name} {key}", {**row, "id": key})


def convert_ocrvqa(row: Row) -> Sample:
    """Return the sample of a book cover's questions."""
    turns = list(zip(row["questions"], row["answers"], strict=True))
    turns[0] = (f"{turns[0][0]}\n{SHORT_ANSWER}", turns[0][1])
    return make_sample("ocrvqa", row["id"], make_turns(turns), f"{row['id']}.jpg")


def _read_words(folder: Folder, names: list[str], split: str) -> dict[str, list[str]]:
    """Return what an OCR system read in each image; empty without its file."""
    found = [name for name in names if "Rosetta_OCR" in name and name.endswith(f"_{split}.json")]
    words: dict[str, list[str]] = {}
    for name in found[:1]:
        for raw in read_json_list(folder, name, "data.item"):
            if isinstance(raw.row, dict):
                words[raw.row["image_id"]] = raw.row["ocr_tokens"]
    return words


def _write_words(row: Row) -> str:
    return f"\nReference OCR token: {', '.join(row['words'])}" if row["words"] else ""


def _name_image(row: Row) -> str:
    return f"train_images/{row['image_id']}.jpg"
