"""Questions about photographs: VQAv2, OK-VQA, A-OKVQA and VizWiz, as LLaVA's 665k mix has them.

The files tell which of them it is: VQAv2 and OK-VQA come as a file of questions and one of
annotations, whose questions about one image become one conversation; A-OKVQA's is one list, whose
questions are asked once for each rotation of the choices; VizWiz's is one list without choices.
What is learned is the answer that most people gave.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llava_ray.data.sources.building import (
    LETTER_ANSWER,
    LETTERS,
    SHORT_ANSWER,
    RawRow,
    Row,
    make_sample,
    make_turns,
    most_frequent,
    write_options,
)
from llava_ray.data.sources.readers import read_json, read_json_list
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
    """Return the sample of one conversation; `row["kind"]` says how it is asked."""
    if row["kind"] == "aokvqa":
        return _convert_choices(row)
    turns = [(turn["question"], most_frequent(turn["answers"])) for turn in row["turns"]]
    hint = f"\n{UNANSWERABLE}" if row["kind"] == "vizwiz" else ""
    turns[0] = (f"{turns[0][0]}{hint}\n{SHORT_ANSWER}", turns[0][1])
    return make_sample(row["kind"], row["id"], make_turns(turns), row["image"])


def _convert_choices(row: Row) -> Sample:
    turn = row["choice"]
    shift, choices = row["rotation"], turn["choices"]
    rotated = [*choices[shift:], *choices[:shift]]
    answer = LETTERS[rotated.index(choices[turn["correct_choice_idx"]])]
    question = f"{turn['question']}\n{write_options(rotated)}\n{LETTER_ANSWER}"
    sample_id = f"{turn['question_id']}-{shift}"
    return make_sample("aokvqa", sample_id, make_turns([(question, answer)]), row["image"])


def _read_merged(folder: Folder, name: str, split: str, names: Sequence[str]) -> Iterator[RawRow]:
    """Yield a row for each image of VQAv2 or OK-VQA, with all its questions."""
    is_v2 = "v2_OpenEnded" in name
    annotations = name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    if annotations not in names:
        raise ConfigError(f"{name!r} needs {annotations!r} in the same folder: add that file")
    answers = {
        found["question_id"]: [found["multiple_choice_answer"]]
        if "multiple_choice_answer" in found
        else [answer["answer"] for answer in found["answers"]]
        for found in read_json(folder, annotations)["annotations"]
    }
    turns: defaultdict[int, list[Row]] = defaultdict(list)
    for asked in read_json(folder, name)["questions"]:
        turn = {"question": asked["question"], "answers": answers.get(asked["question_id"], [])}
        turns[asked["image_id"]].append(turn)
    for image_id, found in turns.items():
        row = {
            "kind": "vqav2" if is_v2 else "okvqa",
            "id": image_id,
            "image": _name_coco(split, image_id),
            "turns": found,
        }
        yield RawRow(f"{name} image {image_id}", row)


def _read_rotated(folder: Folder, name: str, split: str, names: Sequence[str]) -> Iterator[RawRow]:
    """Yield a row for each question of A-OKVQA and rotation of its choices."""
    for raw in read_json_list(folder, name):
        assert isinstance(raw.row, dict)
        for rotation in range(max(1, len(raw.row.get("choices", ())))):
            image = _name_coco(f"{split}2017", raw.row.get("image_id", 0))
            yield RawRow(
                raw.where,
                {"kind": "aokvqa", "choice": raw.row, "rotation": rotation, "image": image},
            )


def _read_vizwiz(folder: Folder, name: str, split: str, names: Sequence[str]) -> Iterator[RawRow]:
    for raw in read_json_list(folder, name):
        assert isinstance(raw.row, dict)
        answers = [answer["answer"] for answer in raw.row.get("answers", ())]
        image = raw.row.get("image", "")
        turns = [{"question": raw.row.get("question", ""), "answers": answers}]
        row = {"kind": "vizwiz", "id": image, "image": f"{split}/{image}", "turns": turns}
        yield RawRow(raw.where, row)


def _name_coco(split: str, image_id: int) -> str:
    prefix = "" if split.endswith("2017") else f"COCO_{split}_"
    return f"{split}/{prefix}{image_id:012d}.jpg"
