"""Reads questions whose answer is a word or a phrase: VQAv2, GQA, VizWiz, TextVQA."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.errors import SampleError
from llava_ray.evaluate.datasets.files import (
    SHORT,
    find_file,
    get_field,
    get_text,
    number_repeats,
    read_json,
    read_jsonl,
)
from llava_ray.types import Question

UNANSWERABLE = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
)


def read_vqav2_val(folder: Path) -> list[Question]:
    """VQAv2's own questions and annotations of val2014."""
    questions = read_json(find_file(folder, "v2_OpenEnded_mscoco_val2014_questions.json"))
    path = find_file(folder, "v2_mscoco_val2014_annotations.json")
    annotations = {
        row["question_id"]: row for row in get_field(read_json(path), "annotations", path.name)
    }
    return [_join_vqav2(row, annotations, folder) for row in questions["questions"]]


def _join_vqav2(row: dict[str, Any], annotations: dict[Any, Any], folder: Path) -> Question:
    number = row["question_id"]
    note = get_field(annotations, number, "the file of VQAv2's annotations")
    image = folder / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg"
    return Question(
        str(number),
        row["question"] + SHORT,
        (str(image),),
        tuple(answer["answer"] for answer in note["answers"]),
        groups=(f"answer_type/{note['answer_type']}",),
        cluster=str(row["image_id"]),
        source_id=str(number),
    )


def read_vqav2_test(folder: Path) -> list[Question]:
    """LLaVA's file of test-dev2015, or of all of test2015 where that is missing; no answers."""
    names = [f"llava_vqav2_mscoco_{split}.jsonl" for split in ("test-dev2015", "test2015")]
    return read_llava(find_file(folder, *names), folder / "test2015")


def read_gqa(folder: Path) -> list[Question]:
    """LLaVA's file of testdev_balanced, answers from GQA's."""
    name = "testdev_balanced_questions.json"
    path = find_file(folder, f"data/{name}", f"data/questions1.2/{name}", name)
    notes = read_json(path)
    questions = []
    for question in read_llava(
        find_file(folder, "llava_gqa_testdev_balanced.jsonl"), folder / "data/images"
    ):
        note = get_field(notes, question.source_id, path.name)
        kind = "open" if note["types"]["structural"] == "query" else "binary"
        questions.append(
            _answer(question, (note["answer"],), (kind,), cluster=str(note.get("imageId", "")))
        )
    return questions


def read_vizwiz_test(folder: Path) -> list[Question]:
    """LLaVA's file of the test split; no answers."""
    return read_llava(find_file(folder, "llava_test.jsonl"), folder / "test")


def read_vizwiz_val(folder: Path) -> list[Question]:
    """VizWiz's own val.json."""
    path = find_file(folder, "val.json", "Annotations/val.json")
    return [
        Question(
            row["image"],
            row["question"] + UNANSWERABLE,
            (str(folder / "val" / row["image"]),),
            tuple(
                answer["answer"] for answer in get_field(row, "answers", f"{path.name}, row {i}")
            ),
            groups=(f"answer_type/{get_field(row, 'answer_type', row['image'])}",),
            source_id=row["image"],
        )
        for i, row in enumerate(read_json(path))
    ]


def read_textvqa(folder: Path) -> list[Question]:
    """LLaVA's file with OCR tokens, answers from TextVQA_0.5.1_val.json by image and question.

    LLaVA's ids are those of the images, of which many have several questions; predictions may
    give TextVQA's own ids instead.
    """
    path = find_file(folder, "TextVQA_0.5.1_val.json")
    listed = get_field(read_json(path), "data", path.name)
    notes = {(note["image_id"], note["question"].lower()): note for note in listed}
    questions = []
    for question in read_llava(
        find_file(folder, "llava_textvqa_val_v051_ocr.jsonl"), folder / "train_images"
    ):
        asked = extract_textvqa_question(question.text)
        note = get_field(notes, (question.source_id, asked), path.name)
        answered = _answer(question, tuple(note["answers"]), cluster=question.source_id)
        own_id = get_text(note, "question_id", path.name, default="")
        questions.append(replace(answered, other_ids=(own_id,) if own_id else ()))
    return questions


def extract_textvqa_question(prompt: str) -> str:
    """Return the question in one of LLaVA's three TextVQA prompts, in lower case.

    Raises:
        SampleError: it is none of them.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if match := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return match[1].lower()
    elif len(lines) == 3 and "Reference OCR token: " in prompt:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise SampleError(f"not a TextVQA prompt of LLaVA's: {prompt[:120]!r}")


def read_llava(path: Path, images: Path) -> list[Question]:
    """LLaVA's question file: `question_id`, `text`, and mostly `image` and `category`."""
    rows = read_jsonl(path)
    ids = number_repeats(
        get_text(row, "question_id", f"{path}, row {i}") for i, row in enumerate(rows, start=1)
    )
    return [
        Question(
            question_id,
            get_text(row, "text", f"{path}, question {question_id}"),
            (str(images / image),) if image else (),
            groups=(category,) if category else (),
            cluster=image,
            source_id=str(row["question_id"]),
        )
        for question_id, row in zip(ids, rows, strict=True)
        for image in [get_text(row, "image", question_id, default="")]
        for category in [get_text(row, "category", question_id, default="")]
    ]


def _answer(
    question: Question, answers: tuple[str, ...], groups: tuple[str, ...] = (), *, cluster: str
) -> Question:
    return replace(question, answers=answers, groups=groups, cluster=cluster)
