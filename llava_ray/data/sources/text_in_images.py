"""Images with text in them: TextVQA, TextCaps, OCR-VQA.

TextVQA and TextCaps (Singh et al. 2019, Sidorov et al. 2020) are `{"data": [...]}`, with images
train_images/{image_id}.jpg. If TextVQA_Rosetta_OCR_*.json is there, the words that an OCR system
read in the image are added to the question. TextCaps gives one caption per image. OCR-VQA (Mishra
et al. 2019) is dataset.json, with images images/{id}.jpg; its splits 1, 2 and 3 are train, val and
test.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import (
    BROKEN_ROW,
    ONE_SENTENCE,
    SHORT_ANSWER,
    RawRow,
    Row,
    make_raw_row,
    make_sample,
    make_turns,
    most_frequent,
    read_text,
)
from llava_ray.data.sources.readers import find_one, read_json_dict, read_json_list
from llava_ray.errors import ConfigError, SampleError
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
    for raw in read_json_list(folder, name, "data"):
        yield make_raw_row(raw.where, lambda raw=raw: _add_words(raw.get(), words))


def convert_textvqa(row: Row) -> Sample:
    """Return the sample of a question about the text in an image."""
    asked = read_text(row["question"], "the question")
    question = f"{asked}{_write_words(row)}\n{SHORT_ANSWER}"
    turns = [(question, most_frequent(row["answers"]))]
    return make_sample("textvqa", row["question_id"], make_turns(turns), _name_image(row))


def read_textcaps(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for the first caption of each image."""
    split = config.split or "train"
    name = find_one(folder, names, f"TextCaps_0.1_{split}.json")
    words = _read_words(folder, names, split)
    seen: set[str] = set()
    for raw in read_json_list(folder, name, "data"):
        found = make_raw_row(raw.where, lambda raw=raw: _add_words(raw.get(), words))
        if isinstance(found.row, SampleError):
            yield found
        elif found.row["image_id"] not in seen:
            seen.add(found.row["image_id"])
            yield found


def convert_textcaps(row: Row) -> Sample:
    """Return the sample of a caption."""
    caption = read_text(row["caption_str"], "the caption").strip()
    turns = [(f"{ONE_SENTENCE}{_write_words(row)}", caption)]
    return make_sample("textcaps", row["image_id"], make_turns(turns), _name_image(row))


def read_ocrvqa(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each book cover of the split."""
    split = config.split or "train"
    if split not in OCR_VQA_SPLITS:
        raise ConfigError(f"split={split!r}: OCR-VQA has {', '.join(OCR_VQA_SPLITS)}")
    name = find_one(folder, names, "dataset.json")
    for key, raw in read_json_dict(folder, name):
        is_rejected = isinstance(raw.row, SampleError)
        if is_rejected or raw.get().get("split") == OCR_VQA_SPLITS[split]:
            yield make_raw_row(raw.where, lambda key=key, raw=raw: {**raw.get(), "id": key})


def convert_ocrvqa(row: Row) -> Sample:
    """Return the sample of a book cover's questions."""
    questions, answers = row["questions"], row["answers"]
    if not isinstance(questions, list) or not isinstance(answers, list):
        raise SampleError("questions and answers are not lists", reason="bad_row")
    turns = list(zip(questions, answers, strict=True))
    turns[0] = (f"{turns[0][0]}\n{SHORT_ANSWER}", turns[0][1])
    return make_sample("ocrvqa", row["id"], make_turns(turns), f"{row['id']}.jpg")


def _read_words(folder: Folder, names: list[str], split: str) -> dict[str, list[str]]:
    """Return the words that an OCR system read in each image; empty without its file.

    Raises:
        ConfigError: an entry of that file is broken, which would change questions in silence.
    """
    found = [name for name in names if "Rosetta_OCR" in name and name.endswith(f"_{split}.json")]
    words: dict[str, list[str]] = {}
    for name in found[:1]:
        for raw in read_json_list(folder, name, "data"):
            try:
                row = raw.get()
                image_id = read_text(row["image_id"], "image_id")
                words[image_id] = [read_text(word, "a word") for word in row["ocr_tokens"]]
            except (SampleError, *BROKEN_ROW) as error:
                raise ConfigError(
                    f"{raw.where} is broken ({error}): download the file again, or move it away to "
                    "ask without the words in the images"
                ) from error
    return words


def _add_words(row: Row, words: dict[str, list[str]]) -> Row:
    image_id = read_text(row["image_id"], "image_id")
    return {**row, "words": words.get(image_id, [])}


def _write_words(row: Row) -> str:
    return f"\nReference OCR token: {', '.join(row['words'])}" if row["words"] else ""


def _name_image(row: Row) -> str:
    return f"train_images/{row['image_id']}.jpg"
