"""Questions with options: ScienceQA, MMBench, SEED-Bench, Q-Bench."""

import base64
import binascii
import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.errors import SampleError
from llava_ray.evaluate.reading.files import (
    LETTER,
    field,
    find_file,
    list_options,
    read_json,
)
from llava_ray.evaluate.reading.open_answer import read_llava
from llava_ray.types import Question

LETTER_CN = "\n请直接回答选项字母。"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_TURN = 1_000_000
"""MMBench: the same question with its options turned has an index a multiple of this higher."""


def read_scienceqa(folder: Path) -> list[Question]:
    """ScienceQA's test split, by subject, context and grade.

    The questions are those of LLaVA's llava_test_CQM-A.json, or made like them if it is missing.
    """
    path = find_file(folder, "problems.json")
    problems = read_json(path)
    asked: dict[str, tuple[str, str | None]] = {}
    if (folder / "llava_test_CQM-A.json").is_file():
        for row in read_json(folder / "llava_test_CQM-A.json"):
            text = row["conversations"][0]["value"].replace("<image>", "").strip()
            asked[str(field(row, "id", "llava_test_CQM-A.json"))] = text, row.get("image")
    else:
        for number in read_json(find_file(folder, "pid_splits.json"))["test"]:
            problem = field(problems, number, path.name)
            picture = f"{number}/{problem['image']}" if problem.get("image") else None
            asked[number] = _write_scienceqa(problem), picture
    return [
        Question(
            number,
            text + LETTER,
            (str(folder / "images" / "test" / picture),) if picture else (),
            (chr(65 + field(problems, number, path.name)["answer"]),),
            tuple(problems[number]["choices"]),
            tuple(_group_scienceqa(problems[number], has_picture=bool(picture))),
            source_id=number,
        )
        for number, (text, picture) in asked.items()
    ]


def _write_scienceqa(problem: dict[str, Any]) -> str:
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    return f"{context}{problem['question']}\n{list_options(problem['choices'])}"


def read_scienceqa_img(folder: Path) -> list[Question]:
    """ScienceQA's questions that have a picture: the number in LLaVA's tables."""
    return [question for question in read_scienceqa(folder) if question.images]


def _group_scienceqa(problem: dict[str, Any], *, has_picture: bool) -> Iterator[str]:
    yield f"subject/{_SUBJECTS.get(problem.get('subject', ''), 'other')}"
    if problem.get("hint"):
        yield "context/TXT"
    if has_picture:
        yield "context/IMG"
    if not has_picture and not problem.get("hint"):
        yield "context/NO"
    if digits := "".join(filter(str.isdigit, str(problem.get("grade", "")))):
        yield "grade/G1-6" if int(digits) <= 6 else "grade/G7-12"


def read_mmbench_en(folder: Path) -> list[Question]:
    """MMBench's English TSV."""
    return read_mmbench(find_mmbench(folder, "en"), LETTER)


def read_mmbench_cn(folder: Path) -> list[Question]:
    """MMBench's Chinese TSV."""
    return read_mmbench(find_mmbench(folder, "cn"), LETTER_CN)


def find_mmbench(folder: Path, language: str) -> Path:
    """Return the TSV of the dev split, "en" or "cn"."""
    names = {"en": "mmbench_dev_20230712.tsv", "cn": "mmbench_dev_cn_20231003.tsv"}
    return find_file(folder, names[language])


def read_mmbench(path: Path, suffix: str) -> list[Question]:
    """A TSV of MMBench's, with pictures in base64; options end at the first that is empty."""
    questions = []
    for row in read_tsv(path):
        index = field(row, "index", str(path))
        where = f"{path.name}, index {index}"
        options = []
        for letter in "ABCD":
            if _is_none(row.get(letter)):
                break
            options.append(row[letter])
        hint = "" if _is_none(row.get("hint")) else row["hint"] + "\n"
        text = f"{hint}{field(row, 'question', where)}\n{list_options(options)}{suffix}"
        answer = row.get("answer", "")
        questions.append(
            Question(
                index,
                text,
                (_decode(field(row, "image", where), where),),
                (answer,) if answer else (),
                tuple(options),
                tuple(f"category/{row['category']}" for _ in range(bool(row.get("category")))),
                cluster=str(int(index) % _TURN),
                source_id=index,
            )
        )
    return questions


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a TSV; a field may hold line breaks if it is quoted."""
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _is_none(value: str | None) -> bool:
    return value is None or value.lower() in ("", "nan", "none")


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise SampleError(f"{where}: the picture is not base64 ({error})") from error


def read_seedbench(folder: Path) -> list[Question]:
    """LLaVA's file, answers and types from SEED-Bench.json; videos by their middle frame."""
    path = find_file(folder, "SEED-Bench.json")
    notes = read_json(path)
    types = {number: name for name, number in notes["question_type"].items()}
    by_id = {str(row["question_id"]): row for row in notes["questions"]}
    questions = []
    for question in read_llava(find_file(folder, "llava-seed-bench.jsonl"), folder):
        note = field(by_id, question.source_id, path.name)
        kind = types.get(note["question_type_id"], str(note["question_type_id"]))
        groups = (f"data/{note['data_type']}", f"type/{kind}")
        choices = tuple(note[f"choice_{letter}"] for letter in "abcd" if f"choice_{letter}" in note)
        questions.append(
            replace(question, answers=(note["answer"],), choices=choices, groups=groups)
        )
    return questions


def read_qbench(folder: Path) -> list[Question]:
    """Q-Bench's llvisionqa_dev.json (English)."""
    path = find_file(folder, "llvisionqa_dev.json")
    questions = []
    for number, row in enumerate(read_json(path)):
        choices = tuple(field(row, "candidates", f"{path.name}, row {number}"))
        intro = "\nChoose between one of the options as follows:\n"
        right = row.get("correct_ans")
        if right is not None and right not in choices:
            raise SampleError(f"{path.name}, row {number}: {right!r} is none of {list(choices)}")
        questions.append(
            Question(
                str(number),
                row["question"] + intro + list_options(choices) + "\n",
                (str(folder / "images_llvisionqa" / row["img_path"]),),
                (chr(65 + choices.index(right)),) if right is not None else (),
                choices,
                cluster=row["img_path"],
                source_id=str(number),
            )
        )
    return questions
