"""Training in plain processes: the same losses whatever the workers, the accumulation, the ZeRO."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_gang import Scenario, make_batches, make_config, read_losses, run_gang

from llava_ray.model import load_model

NUM_STEPS = 20
ZEROS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero2-offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero3": {"zero_stage": 3},
    "zero3-offload": {"zero_stage": 3, "offload": "all"},
}
PARTS: dict[str, dict[str, Any]] = {
    "projector": {"method": "projector", "zero_stage": 2},
    "lora": {"method": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0},
    "tower": {"train_vision_tower": True, "vision_lr": 1e-4, "mm_projector_lr": 1e-3},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all runs of this file: one gang of one process, one of two."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [
        Scenario("alone", {"zero_stage": 2}, num_steps=NUM_STEPS),
        *(Scenario(f"alone-{name}", settings, num_steps=5) for name, settings in PARTS.items()),
        Scenario("qlora", {**PARTS["lora"], "quantization": "4bit"}),
        Scenario("diverging", {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_ratio": 0}),
    ]
    together = [
        *(Scenario(name, settings, num_steps=NUM_STEPS) for name, settings in ZEROS.items()),
        *(
            Scenario(f"two-{name}", {"zero_stage": 3, **settings}, num_steps=5)
            for name, settings in PARTS.items()
        ),
    ]
    run_gang(1, alone, folder)
    run_gang(2, together, folder)
    return folder


def train_plainly(num_steps: int) -> list[float]:
    """Return the losses of a bare loop that has each global batch whole."""
    from transformers import get_cosine_schedule_with_warmup

    config = make_config(train_batch_size=4, per_device_train_batch_size=4)
    model: Any = load_model(config.model, dtype="float32", device="cpu").model.train()
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * num_steps), num_steps)
    losses = []
    for _, batch in zip(range(num_steps), make_batches(config, 0, 1, None), strict=False):
        inputs = batch.to_tensors()
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_losses_are_those_of_a_plain_loop(runs: Path) -> None:
    losses = read_losses(runs, "alone")
    assert losses == pytest.approx(train_plainly(NUM_STEPS), rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ZEROS)
def test_losses_are_the_same_on_two_workers_under_every_zero(runs: Path, name: str) -> None:
    assert read_losses(runs, name) == pytest.approx(read_losses(runs, "alone"), rel=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_whatever_is_trained_two_workers_agree_with_one(runs: Path, name: str) -> None:
    two, one = read_losses(runs, f"two-{name}"), read_losses(runs, f"alone-{name}")
    assert two == pytest.approx(one, rel=1e-5)
    assert two[-1] != two[0]


def test_every_step_names_its_samples_and_an_epoch_has_each_once(runs: Path) -> None:
    lines = [json.loads(x) for x in (runs / "zero2" / "train_log.jsonl").read_text().splitlines()]
    ids = [id_ for line in lines[:6] for id_ in line["sample_ids"]]
    assert sorted(ids) == sorted(f"sample-{number}" for number in range(24))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(runs: Path) -> None:
    said = (runs / "diverging" / "error.txt").read_text()
    assert "the loss is" in said
    assert "'sample-" in said
    assert "lower learning_rate" in said


def test_adapters_over_four_bit_weights_learn(runs: Path) -> None:
    losses = read_losses(runs, "qlora")
    assert losses[-1] < losses[0]
