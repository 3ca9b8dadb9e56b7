"""Reads questions that a judge grades (LLaVA-Bench, MM-Vet), and captions (COCO)."""

from dataclasses import replace
from pathlib import Path

from llava_ray.data.sources.building import ONE_SENTENCE
from llava_ray.evaluate.datasets.files import find_file, get_field, read_json, read_jsonl
from llava_ray.evaluate.datasets.open_answer import read_llava
from llava_ray.types import Question


def read_llava_bench(folder: Path) -> list[Question]:
    """questions.jsonl, with the images in words and GPT-4's reference answers."""
    captions = {}
    for row in read_jsonl(find_file(folder, "context.jsonl")):
        caption = row["caption"]
        captions[row["image"]] = caption if isinstance(caption, str) else "\n".join(caption)
    references = {
        str(row["question_id"]): row["text"]
        for row in read_jsonl(find_file(folder, "answers_gpt4.jsonl"))
    }
    return [
        replace(
            question,
            answers=(get_field(references, question.source_id, "answers_gpt4.jsonl"),),
            context=get_field(captions, question.cluster, "context.jsonl"),
        )
        for question in read_llava(find_file(folder, "questions.jsonl"), folder / "images")
    ]


def read_mmvet(folder: Path) -> list[Question]:
    """LLaVA's file, ground truth and capabilities from mm-vet.json.

    LLaVA's questions are in `mm-vet`; its guide has the benchmark unpacked into `mmvet`.
    """
    places = ("", "mm-vet/", "../mmvet/", "../mmvet/mm-vet/", "../mm-vet/")
    path = find_file(folder, *(f"{place}mm-vet.json" for place in places))
    asked = find_file(folder, *(f"{place}llava-mm-vet.jsonl" for place in places))
    notes = read_json(path)
    questions = []
    for question in read_llava(asked, path.parent / "images"):
        note = get_field(notes, f"v1_{question.source_id}", path.name)
        needed = sorted(set(get_field(note, "capability", question.source_id)))
        groups = (*needed, f"together/{'+'.join(needed)}")
        questions.append(replace(question, answers=(note["answer"],), groups=groups))
    return questions


def read_coco2014(folder: Path) -> list[Question]:
    """COCO's captions_val2014.json."""
    return read_coco(folder, "2014", "val2014/COCO_val2014_{:012d}.jpg")


def read_coco2017(folder: Path) -> list[Question]:
    """COCO's captions_val2017.json."""
    return read_coco(folder, "2017", "val2017/{:012d}.jpg")


def read_coco(folder: Path, year: str, image: str) -> list[Question]:
    """COCO's captions of a year: a question an image, with all its captions as answers."""
    name = f"captions_val{year}.json"
    captions: dict[int, list[str]] = {}
    path = find_file(folder, f"annotations/{name}", name)
    for row in get_field(read_json(path), "annotations", name):
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return [
        Question(
            str(number),
            ONE_SENTENCE,
            (str(folder / image.format(number)),),
            tuple(texts),
            source_id=str(number),
        )
        for number, texts in captions.items()
    ]
