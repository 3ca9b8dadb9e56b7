"""Questions about photographs: VQAv2, OK-VQA, A-OKVQA and VizWiz, as in LLaVA's 665k mixture.

File names tell which data set it is. VQAv2 and OK-VQA have a file of questions and one of
annotations; all questions about an image become one conversation. A-OKVQA has one list; each of its
questions is asked once for every rotation of the choices. VizWiz has one list without choices. The
answer that most people gave is learned.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llava_ray.data.sources.building import (
    LETTER_ANSWER,
    LETTERS,
    SHORT_ANSWER,
    RawRow,
    Row,
    group_rows,
    index_rows,
    make_raw_row,
    make_sample,
    make_turns,
    most_frequent,
    pick_letter,
    read_text,
    write_options,
)
from llava_ray.data.sources.readers import read_json_list, read_json_object
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."

_QUESTIONS = re.compile(r"(?:.*/)?(?:v2_)?OpenEnded_mscoco_(\w+)_questions\.json")
_AOKVQA = re.compile(r"(?:.*/)?aokvqa_v1p0_(\w+)\.json")
_VIZWIZ = re.compile(r"(?:.*/)?(train|val)\.json")


def read_vqa(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each conversation, of every file of the split (all, by default)."""
    readers = ((_QUESTIONS, _read_merged), (_AOKVQA, _read_rotated), (_VIZWIZ, _read_vizwiz))
    num_files = 0
    for name in names:
        for pattern, read in readers:
            match = pattern.fullmatch(name)
            if match and config.split in ("", match[1]):
                num_files += 1
                yield from read(folder, name, match[1], names)
                break
    if not num_files:
        raise ConfigError(
            f"there are no questions of split {config.split or 'any'!r} in {folder.address!r}: "
            "give a folder with OpenEnded_mscoco_*_questions.json and its annotations, "
            "aokvqa_v1p0_*.json, or VizWiz's train.json"
        )


def convert_vqa(row: Row) -> Sample:
    """Return the sample of one conversation; `row["kind"]` names the data set."""
    if row["kind"] == "aokvqa":
        return _convert_choices(row)
    turns = [
        (read_text(turn["question"], "the question"), most_frequent(turn["answers"]))
        for turn in row["turns"]
    ]
    hint = f"\n{UNANSWERABLE}" if row["kind"] == "vizwiz" else ""
    turns[0] = (f"{turns[0][0]}{hint}\n{SHORT_ANSWER}", turns[0][1])
    return make_sample(row["kind"], row["id"], make_turns(turns), row["image"])


def _convert_choices(row: Row) -> Sample:
    turn = row["choice"]
    shift, choices, correct = row["rotation"], turn["choices"], turn["correct_choice_idx"]
    pick_letter(correct, choices)
    rotated = [*choices[shift:], *choices[:shift]]
    answer = pick_letter((correct - shift) % len(choices), rotated)
    question = read_text(turn["question"], "the question")
    question = f"{question}\n{write_options(rotated)}\n{LETTER_ANSWER}"
    sample_id = f"{turn['question_id']}-{shift}"
    return make_sample("aokvqa", sample_id, make_turns([(question, answer)]), row["image"])


def _read_merged(folder: Folder, name: str, split: str, names: Sequence[str]) -> Iterator[RawRow]:
    """Yield a row for each image of VQAv2 or OK-VQA, with all its questions."""
    is_v2 = "v2_OpenEnded" in name
    other = name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    if other not in names:
        raise ConfigError(f"{name!r} needs {other!r} in the same folder: add that file")
    annotations = read_json_object(folder, other, annotations=list)["annotations"]
    answers, rejects = index_rows(f"{other} annotations", annotations, "question_id")
    yield from rejects
    questions = read_json_object(folder, name, questions=list)["questions"]
    by_image, rejects = group_rows(f"{name} questions", questions, "image_id")
    yield from rejects
    for image_id, asked in by_image.items():
        yield make_raw_row(
            f"{name} image {image_id}",
            lambda image_id=image_id, asked=asked: {
                "kind": "vqav2" if is_v2 else "okvqa",
                "id": image_id,
                "image": _name_coco(split, image_id),
                "turns": [_merge(question, answers) for question in asked],
            },
        )


def _merge(question: Row, annotations: dict[Any, Row]) -> Row:
    """Return a question with the answers of several people, or the one they agreed on."""
    found = annotations.get(question["question_id"], {})
    if "multiple_choice_answer" in found:
        answers = [found["multiple_choice_answer"]]
    else:
        answers = [answer["answer"] for answer in found.get("answers", ())]
    return {"question": question["question"], "answers": answers}


def _read_rotated(folder: Folder, name: str, split: str, names: Sequence[str]) -> Iterator[RawRow]:
    """Yield a row for each question of A-OKVQA and each rotation of its choices."""
    for raw in read_json_list(folder, name):
        choices = raw.row.get("choices") if isinstance(raw.row, dict) else None
        num_rotations = len(choices) if isinstance(choices, list) else 1
        for rotation in range(num_rotations if 0 < num_rotations <= len(LETTERS) else 1):
            yield make_raw_row(
                raw.where,
                lambda raw=raw, rotation=rotation: {
                    "kind": "aokvqa",
                    "choice": raw.get(),
                    "rotation": rotation,
                    "image": _name_coco(f"{split}2017", raw.get()["image_id"]),
                },
            )


def _read_vizwiz(folder: Folder, name: str, split: str, names: Sequence[str]) -> Iterator[RawRow]:
    for raw in read_json_list(folder, name):
        yield make_raw_row(raw.where, lambda raw=raw: _read_vizwiz_row(raw.get(), split))


def _read_vizwiz_row(row: Row, split: str) -> Row:
    image = read_text(row["image"], "image")
    answers = [answer["answer"] for answer in row.get("answers", ())]
    turns = [{"question": row["question"], "answers": answers}]
    return {"kind": "vizwiz", "id": image, "image": f"{split}/{image}", "turns": turns}


def _name_coco(split: str, image_id: int) -> str:
    prefix = "" if split.endswith("2017") else f"COCO_{split}_"
    return f"{split}/{prefix}{image_id:012d}.jpg"
