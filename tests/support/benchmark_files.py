"""LLaVA's benchmarks in the layout of its docs/Evaluation.md, a few questions each, with images.

`WRITERS[folder](root)` writes one; `write_all` writes them all, as `playground/data/eval`.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.raw_data import save, write_json

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
MME_SUBTASKS = (
    "existence count position color posters celebrity scene landmark artwork OCR "
    "commonsense_reasoning numerical_calculation text_translation code_reasoning"
).split()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_all(root: Path) -> Path:
    """Write every benchmark below a folder and return it."""
    for write in WRITERS.values():
        write(root)
    return root


def write_vqav2(root: Path) -> None:
    folder = root / "vqav2"
    asked = [{"question_id": 42000 + i, "image_id": 42, "question": "What is it?"} for i in (1, 2)]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    answers = [{"answer": "net", "answer_id": i + 1} for i in range(3)]
    answers += [{"answer": "a tennis net", "answer_id": i + 4} for i in range(7)]
    notes = [{**row, "answer_type": "other", "answers": answers} for row in asked]
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": notes})
    save(folder / "val2014" / "COCO_val2014_000000000042.jpg")
    rows = [
        {"question_id": i, "image": f"COCO_test2015_{i:012d}.jpg", "text": f"What is {i}?{SHORT}"}
        for i in (7, 8, 9)
    ]
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2])
    for row in rows:
        save(folder / "test2015" / row["image"])


def write_gqa(root: Path) -> None:
    folder = root / "gqa"
    rows = [
        {"question_id": "201", "image": "n1.jpg", "text": f"Is it red?{SHORT}"},
        {"question_id": "202", "image": "n1.jpg", "text": f"What is it?{SHORT}"},
    ]
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    notes = {
        "201": {"answer": "yes", "types": {"structural": "verify"}, "imageId": "n1"},
        "202": {"answer": "chair", "types": {"structural": "query"}, "imageId": "n1"},
    }
    write_json(folder / "data" / "testdev_balanced_questions.json", notes)
    save(folder / "data" / "images" / "n1.jpg")


def write_vizwiz(root: Path) -> None:
    folder = root / "vizwiz"
    answers = [{"answer": "soda", "answer_confidence": "yes"} for _ in range(4)]
    answers += [{"answer": "unanswerable", "answer_confidence": "maybe"} for _ in range(6)]
    name = "VizWiz_val_00000000.jpg"
    notes = [
        {"image": name, "question": "What is this?", "answers": answers, "answer_type": "other"}
    ]
    write_json(folder / "val.json", notes)
    save(folder / "val" / name)
    rows = [
        {
            "question_id": i,
            "image": f"VizWiz_test_{i:08d}.jpg",
            "text": f"What is this?{UNANSWERABLE}{SHORT}",
        }
        for i in range(2)
    ]
    write_lines(folder / "llava_test.jsonl", rows)
    for row in rows:
        save(folder / "test" / row["image"])


def write_scienceqa(root: Path) -> None:
    folder = root / "scienceqa"
    common = {"lecture": "", "solution": "", "split": "test", "skill": "", "topic": ""}
    problems = {
        "4": {
            **common,
            "question": "Which is a cat?",
            "choices": ["cat", "dog"],
            "answer": 0,
            "hint": "Look at it.",
            "image": "image.png",
            "subject": "natural science",
            "grade": "grade2",
        },
        "5": {
            **common,
            "question": "Which is a noun?",
            "choices": ["run", "tree", "old"],
            "answer": 1,
            "hint": "",
            "image": None,
            "subject": "language science",
            "grade": "grade9",
        },
    }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "test": ["4", "5"]})
    first = "<image>\nContext: Look at it.\nWhich is a cat?\nA. cat\nB. dog"
    second = "Which is a noun?\nA. run\nB. tree\nC. old"
    rows = [
        {"id": "4", "image": "4/image.png", "conversations": [{"from": "human", "value": first}]},
        {"id": "5", "conversations": [{"from": "human", "value": second}]},
    ]
    write_json(folder / "llava_test_CQM-A.json", rows)
    save(folder / "images" / "test" / "4" / "image.png")


def write_textvqa(root: Path) -> None:
    folder = root / "textvqa"
    questions = ["What does it say?", "Who wrote it?"]
    rows = [
        {"question_id": "0a1", "image": "0a1.jpg", "text": f"{q}\nReference OCR token: A, B{SHORT}"}
        for q in questions
    ]
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    notes = [
        {"image_id": "0a1", "question": q, "answers": [f"word {i}."] * 10}
        for i, q in enumerate(questions)
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": notes})
    save(folder / "train_images" / "0a1.jpg")


def write_pope(root: Path) -> None:
    """Two splits of four questions; the second's labels are in another order than its questions."""
    folder = root / "pope"
    questions: list[dict[str, Any]] = []
    for split in ("random", "popular"):
        rows = [
            {"question_id": i, "image": f"{i}.jpg", "text": f"Is there a dog {i}?", "label": label}
            for i, label in enumerate(("yes", "no", "yes", "no"))
        ]
        order = rows if split == "random" else rows[::-1]
        write_lines(folder / "coco" / f"coco_pope_{split}.json", order)
        for row in rows:
            text = row["text"] + SHORT
            asked = {"question_id": len(questions), "image": row["image"], "text": text}
            questions.append({**asked, "category": split})
    write_lines(folder / "llava_pope_test.jsonl", questions)
    for i in range(4):
        save(folder / "val2014" / f"{i}.jpg")


def write_mme(root: Path) -> None:
    """Two questions about one image in each subtask; half of these have folders of their own."""
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    rows = []
    for number, subtask in enumerate(MME_SUBTASKS):
        has_folders = number % 2 == 0
        images = release / subtask / ("images" if has_folders else "")
        notes = release / subtask / ("questions_answers_YN" if has_folders else "")
        save(images / "0001.png", number)
        notes.mkdir(parents=True, exist_ok=True)
        gap = " " * (1 + number % 3 % 2)
        asked = [(f"Is it {subtask}?", "Yes"), (f"Is it not {subtask}?", "No")]
        lines = [f"{text}{gap}Please answer yes or no.\t{answer}\n" for text, answer in asked]
        (notes / "0001.txt").write_text("".join(lines))
        image = f"{subtask}/images/0001.png" if has_folders else f"{subtask}/0001.png"
        rows += [
            {
                "question_id": f"{subtask}/0001.png",
                "image": image,
                "text": text + SHORT,
                "category": subtask,
            }
            for text, _ in asked
        ]
    write_lines(folder / "llava_mme.jsonl", rows)


def write_mmbench(root: Path) -> None:
    encoded = base64.b64encode(save(root / "scratch.png")).decode()
    columns = "index question hint A B C D category source image l2-category split answer comment"
    rows = [
        [1, "what?", "", "x", "NA", "", "", "ocr", "s", encoded, "l2", "dev", "A", ""],
        [2, 'a "quoted"\tone?', "two\nlines", "x", "y", "z", "", "ocr", "s", encoded, "l2"],
        [1_000_002, "turned?", "", "z", "x", "y", "", "ocr", "s", encoded, "l2", "dev", "C", ""],
    ]
    rows[1] += ["dev", "B", ""]
    lines = ["\t".join(columns.split())]
    for row in rows:
        cells = [str(cell).replace('"', '""') for cell in row]
        lines.append("\t".join(f'"{c}"' if set(c) & set('"\t\n') else c for c in cells))
    for folder, name in (
        ("mmbench", "mmbench_dev_20230712.tsv"),
        ("mmbench_cn", "mmbench_dev_cn_20231003.tsv"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text("\n".join(lines) + "\n")


def write_seed_bench(root: Path) -> None:
    folder = root / "seed_bench"
    asked = "Which?\nA. a\nB. b\nC. c\nD. d" + LETTER
    rows = [
        {"question_id": 101, "image": "SEED-Bench-image/1", "text": asked},
        {"question_id": "v2", "image": "SEED-Bench-video-image/2.png", "text": asked},
    ]
    write_lines(folder / "llava-seed-bench.jsonl", rows)
    options = {f"choice_{letter}": letter for letter in "abcd"}
    notes = {
        "question_type": {"Scene Understanding": 1, "Action Recognition": 10},
        "questions": [
            {**options, "question_id": "101", "question_type_id": 1, "answer": "B"}
            | {"data_type": "image"},
            {**options, "question_id": "v2", "question_type_id": 10, "answer": "D"}
            | {"data_type": "video"},
        ],
    }
    write_json(folder / "SEED-Bench.json", notes)
    saved = save(folder / "SEED-Bench-video-image" / "2.png")
    (folder / "SEED-Bench-image").mkdir(exist_ok=True)
    (folder / "SEED-Bench-image" / "1").write_bytes(saved)


def write_llava_bench(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    kinds = ("conv", "detail", "complex")
    rows = [
        {"question_id": i, "image": "001.jpg", "text": f"Why {i}?", "category": kind}
        for i, kind in enumerate(kinds)
    ]
    write_lines(folder / "questions.jsonl", rows)
    write_lines(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A hill."}])
    answers = [{"question_id": i, "text": f"Because {i}.", "answer_id": "x"} for i in range(3)]
    write_lines(folder / "answers_gpt4.jsonl", answers)
    save(folder / "images" / "001.jpg")


def write_mmvet(root: Path) -> None:
    folder = root / "mm-vet"
    rows = [{"question_id": i, "image": f"v1_{i}.png", "text": f"What is {i}?"} for i in range(2)]
    write_lines(folder / "llava-mm-vet.jsonl", rows)
    notes = {
        "v1_0": {"imagename": "v1_0.png", "question": "What is 0?", "answer": "dog<AND>cat"}
        | {"capability": ["rec", "know"]},
        "v1_1": {"imagename": "v1_1.png", "question": "What is 1?", "answer": "3"}
        | {"capability": ["ocr"]},
    }
    write_json(folder / "mm-vet.json", notes)
    for row in rows:
        save(folder / "images" / row["image"])


def write_qbench(root: Path) -> None:
    folder = root / "qbench"
    rows = [
        {
            "img_path": "00001.jpg",
            "question": "Is it sharp?",
            "candidates": ["No", "Yes"],
            "correct_ans": "Yes",
        }
    ]
    write_json(folder / "llvisionqa_dev.json", rows)
    save(folder / "images_llvisionqa" / "00001.jpg")


def write_coco(root: Path) -> None:
    folder = root / "coco"
    said = {9: ["A dog runs on the grass.", "The dog is running."], 11: ["Two red cars, parked."]}
    notes = [{"image_id": number, "caption": text} for number in said for text in said[number]]
    for year, name in (("2014", "COCO_val2014_{:012d}.jpg"), ("2017", "{:012d}.jpg")):
        path = folder / "annotations" / f"captions_val{year}.json"
        write_json(path, {"images": [], "annotations": notes})
        for number in said:
            save(folder / f"val{year}" / name.format(number))


WRITERS: dict[str, Callable[[Path], None]] = {
    "vqav2": write_vqav2,
    "gqa": write_gqa,
    "vizwiz": write_vizwiz,
    "scienceqa": write_scienceqa,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "MME": write_mme,
    "mmbench": write_mmbench,
    "mmbench_cn": write_mmbench,
    "seed_bench": write_seed_bench,
    "llava-bench-in-the-wild": write_llava_bench,
    "mm-vet": write_mmvet,
    "qbench": write_qbench,
    "coco": write_coco,
}
