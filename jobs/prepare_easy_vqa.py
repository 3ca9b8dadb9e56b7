"""Writes easy-VQA as an example of your own data: `python jobs/prepare_easy_vqa.py OUT`.

For docs/finetune-your-own-data.md. The package `easy-vqa` (MIT licence, `pip install easy-vqa`) has
5,000 images of one coloured shape each and 48,248 questions about them. This writes

    train.json             LLaVA's format: a JSON list with one conversation an image
    images/                what its `image` fields name
    test/questions.jsonl   a question a line for `llava-ray evaluate --tasks own_exact`, with images
"""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import easy_vqa

NUM_TEST = 500


def write_easy_vqa(folder: Path) -> None:
    """Write the training conversations and the first `NUM_TEST` test questions."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "test").mkdir(exist_ok=True)
    paths = easy_vqa.get_train_image_paths()
    turns = defaultdict(list)
    for question, answer, image_id in zip(*easy_vqa.get_train_questions(), strict=True):
        turns[image_id].append((question, answer))
    rows = []
    for image_id, asked in sorted(turns.items()):
        conversations = []
        for number, (question, answer) in enumerate(asked):
            opening = "" if number else "<image>\n"
            conversations.append({"from": "human", "value": opening + question})
            conversations.append({"from": "gpt", "value": answer})
        name = f"{image_id}.png"
        shutil.copyfile(paths[image_id], folder / "images" / name)
        rows.append({"id": f"train-{image_id}", "image": name, "conversations": conversations})
    (folder / "train.json").write_text(json.dumps(rows, indent=1))
    paths = easy_vqa.get_test_image_paths()
    lines = []
    asked = list(zip(*easy_vqa.get_test_questions(), strict=True))[:NUM_TEST]
    for number, (question, answer, image_id) in enumerate(asked):
        name = f"{image_id}.png"
        shutil.copyfile(paths[image_id], folder / "test" / name)
        row = {"question_id": number, "text": question, "answer": answer, "image": name}
        lines.append(json.dumps(row))
    (folder / "test" / "questions.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_easy_vqa(Path(sys.argv[1]))
