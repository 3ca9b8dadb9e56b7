"""Short training runs on the tiny checkpoint: raw data, settings, and how two runs compare."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_ray.config import TrainConfig
from llava_ray.train.log import read_log
from tests.support.tiny_checkpoint import make_image, tiny_model

NUM_SAMPLES = 24


def write_rows(folder: Path) -> Path:
    """Write conversations in LLaVA's JSON format and their images; return the JSON file."""
    rows = []
    for number in range(NUM_SAMPLES):
        make_image(number).save(folder / f"{number}.png")
        asked = {"from": "human", "value": f"<image>\nWhich number, {number % 5}?"}
        said = {"from": "gpt", "value": f"It is {number * 7}."}
        rows.append({"id": f"s{number}", "image": f"{number}.png", "conversations": [asked, said]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def make_config(
    shards: Path, output: Path, *, num_readers: int = 0, **settings: Any
) -> TrainConfig:
    defaults: dict[str, Any] = {
        "name": "run",
        "model": str(tiny_model()),
        "data": {"datasets": [{"path": str(shards)}], "num_readers": num_readers, "reader_cpus": 0},
        "output_dir": str(output),
        "train_batch_size": 4,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "num_workers": 2,
        "cpus_per_worker": 0.5,
        "save_steps": 3,
        "save_total_limit": 2,
        "bf16": False,
    }
    return TrainConfig(**(defaults | settings))


def read_steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(folder) if "loss" in line]


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    told, expected = read_steps(folder), read_steps(undisturbed)
    assert [set(line["sample_ids"]) for line in told] == [
        set(line["sample_ids"]) for line in expected
    ]
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in told] == pytest.approx(losses, rel=1e-5)
