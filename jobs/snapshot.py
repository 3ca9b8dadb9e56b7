"""Records what a refactoring must not change; run it before and after, and compare the files.

`python jobs/snapshot.py OUT.json` writes digests of the logits and the greedy ids of the
checkpoints in tests/golden, the demo model's greedy answers about 20 scenes, the OpenAPI document,
and the losses of the first five steps of the recipe tiny_pretrain.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_ray import LLaVA, load_model
from llava_ray.demo import make_example
from llava_ray.serve.openai.openapi import describe_api

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
NUM_SCENES = 20
NUM_QUESTIONS = 4
NUM_STEPS = 5


def compute_golden(case: str) -> list[dict[str, Any]]:
    """Return for each record the SHA-256 of its last 16 rows of logits, and its greedy ids."""
    loaded = load_model(
        GOLDEN / case / "checkpoint",
        vision_tower=str(GOLDEN / "openai-clip-micro"),
        dtype="float32",
    )
    rows = []
    for record in json.loads((GOLDEN / case / "golden.json").read_text())["records"]:
        images = [Image.open(GOLDEN / case / name) for name in record["images"]]
        inputs = loaded.encode(record["prompt"], images)
        with torch.inference_mode():
            logits = loaded.model(**inputs).logits[0, -16:].numpy()
            ids = loaded.model.generate(**inputs, max_new_tokens=24, do_sample=False)
        rows.append({"sha256": hashlib.sha256(logits.tobytes()).hexdigest(), "ids": ids.tolist()})
    return rows


def ask_demo() -> list[list[str]]:
    """Return the demo model's greedy answers as [seed, question, answer]."""
    answers = []
    with LLaVA("demo") as model:
        for seed in range(NUM_SCENES):
            image, questions = make_example(seed)
            for question in questions[:NUM_QUESTIONS]:
                answers.append([str(seed), question, model.chat(question, images=[image])])
    return answers


def train_tiny() -> list[float]:
    """Return the losses of the recipe's first steps, on 400 scenes and with one worker."""

    def run(*words: str) -> None:
        command = [sys.executable, "-m", *words]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
        subprocess.run(command, cwd=folder, check=True, env={**os.environ, **environment})

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run("jobs.embedded_model", "raw", "outputs/tiny-raw", "--scenes", "400")
        parts = ["--llm", "outputs/tiny-raw/llm", "--vision-tower", "outputs/tiny-raw/tower"]
        run("llava_ray.cli", "build", "outputs/tiny-new", *parts)
        raw = ["input=outputs/tiny-raw/captions.json", "images=outputs/tiny-raw/images"]
        run("llava_ray.cli", "convert", "llava", *raw, "output=outputs/tiny-captions")
        steps = [f"max_steps={NUM_STEPS}", f"save_steps={NUM_STEPS}", "logging_steps=1"]
        run("llava_ray.cli", "train", "tiny_pretrain", "num_workers=1", *steps)
        lines = (folder / "outputs/tiny-pretrain/train_log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    snapshot = {
        "golden": {
            case: compute_golden(case) for case in ("llava-v1.5-pad", "llava-v1-linear-square")
        },
        "demo": ask_demo(),
        "openapi": describe_api(["llava-ray-demo"]),
        "losses": train_tiny(),
    }
    Path(sys.argv[1]).write_text(json.dumps(snapshot, indent=1) + "\n")
