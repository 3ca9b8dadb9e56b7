"""Reads multiple-choice questions: ScienceQA, MMBench, SEED-Bench, Q-Bench."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.data.sources.building import LETTERS, write_options
from llava_ray.data.sources.scienceqa import SHORT_FORMAT, convert_scienceqa
from llava_ray.errors import SampleError
from llava_ray.evaluate.datasets.files import LETTER, find_file, get_field, read_json
from llava_ray.evaluate.datasets.open_answer import read_llava
from llava_ray.evaluate.datasets.prompts import LETTER_CN
from llava_ray.evaluate.datasets.tsv import read_rows
from llava_ray.template.tokens import join_text
from llava_ray.types import Question

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_TURN = 1_000_000
"""MMBench: the same question with its options turned has an index a multiple of this higher."""
_NO_VALUE = frozenset(
    "nan NaN -nan -NaN NA N/A n/a #N/A #NA <NA> NULL null None "
    "-1.#IND -1.#QNAN 1.#IND 1.#QNAN".split()
) | {"", "#N/A N/A"}
"""What pandas, with which LLaVA reads MMBench, takes for an empty cell."""


def read_scienceqa(folder: Path) -> list[Question]:
    """ScienceQA's test split, by subject, context and grade.

    The questions are those of LLaVA's llava_test_CQM-A.json, or made like them if it is missing.
    """
    path = find_file(folder, "problems.json")
    problems = read_json(path)
    questions = []
    for number, text, image in _list_scienceqa(folder, problems):
        problem = get_field(problems, number, path.name)
        questions.append(
            Question(
                number,
                text + LETTER,
                (str(folder / "images" / "test" / image),) if image else (),
                (LETTERS[problem["answer"]],),
                tuple(problem["choices"]),
                tuple(_group_scienceqa(problem, has_image=bool(image))),
                source_id=number,
            )
        )
    return questions


def _list_scienceqa(
    folder: Path, problems: dict[str, Any]
) -> Iterator[tuple[str, str, str | None]]:
    """Yield each problem's number, its question and its image within the split's folder."""
    asked = folder / "llava_test_CQM-A.json"
    if asked.is_file():
        for i, row in enumerate(read_json(asked)):
            number = str(get_field(row, "id", f"{asked.name}, row {i}"))
            text = get_field(row, "conversations", f"{asked.name}, {number}")[0]["value"]
            yield number, text.replace("<image>", "").strip(), row.get("image")
        return
    for number in read_json(find_file(folder, "pid_splits.json"))["test"]:
        problem = get_field(problems, number, "problems.json")
        known = {"split": "test", "hint": "", "image": None, **problem}
        sample = convert_scienceqa({**known, "id": number, "format": SHORT_FORMAT})
        image = f"{number}/{known['image']}" if sample.images else None
        yield number, join_text(sample.messages[0]), image


def _group_scienceqa(problem: dict[str, Any], *, has_image: bool) -> Iterator[str]:
    yield f"subject/{_SUBJECTS.get(problem.get('subject', ''), 'other')}"
    if problem.get("hint"):
        yield "context/TXT"
    if has_image:
        yield "context/IMG"
    if not has_image and not problem.get("hint"):
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
    names = {
        "en": ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"),
        "cn": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
    }
    places = ("", "../mmbench/", "../mmbench_cn/")  # LLaVA's guide has both in mmbench
    return find_file(folder, *(f"{place}{name}" for name in names[language] for place in places))


def read_mmbench(path: Path, suffix: str) -> list[Question]:
    """A TSV of MMBench's, with images in base64; options end at the first that is empty."""
    questions = []
    for place, row in read_rows(path):
        index = get_field(row, "index", str(path))
        where = f"{path.name}, index {index}"
        options = []
        for letter in "ABCD":
            if _is_none(row.get(letter, "")):
                break
            options.append(row[letter])
        hint = "" if _is_none(row.get("hint", "")) else row["hint"] + "\n"
        question = get_field(row, "question", where)
        answer = row.get("answer", "")
        questions.append(
            Question(
                index,
                f"{hint}{question}\n{write_options(options)}{suffix}",
                (f"{path}#{place}",),
                () if _is_none(answer) else (answer,),
                tuple(options),
                (f"category/{row['category']}",) if row.get("category") else (),
                cluster=str(int(index) % _TURN),
                source_id=index,
            )
        )
    return questions


def _is_none(value: str) -> bool:
    return value in _NO_VALUE or value.lower() in ("nan", "none")


def read_seedbench(folder: Path) -> list[Question]:
    """LLaVA's file, answers and types from SEED-Bench.json; videos by their middle frame."""
    path = find_file(folder, "SEED-Bench.json")
    notes = read_json(path)
    types = {number: name for name, number in notes["question_type"].items()}
    by_id = {str(row["question_id"]): row for row in notes["questions"]}
    questions = []
    for question in read_llava(find_file(folder, "llava-seed-bench.jsonl"), folder):
        note = get_field(by_id, question.source_id, path.name)
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
        choices = tuple(get_field(row, "candidates", f"{path.name}, row {number}"))
        intro = "\nChoose between one of the options as follows:\n"
        right = row.get("correct_ans")
        if right is not None and right not in choices:
            raise SampleError(f"{path.name}, row {number}: {right!r} is none of {list(choices)}")
        questions.append(
            Question(
                str(number),
                row["question"] + intro + write_options(choices) + "\n",
                (str(folder / "images_llvisionqa" / row["img_path"]),),
                (LETTERS[choices.index(right)],) if right is not None else (),
                choices,
                cluster=row["img_path"],
                source_id=str(number),
                other_ids=(row["img_path"],),
            )
        )
    return questions
