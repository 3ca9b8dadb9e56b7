"""Training in plain processes: the same losses whatever the workers, the accumulation, the ZeRO."""

import platform
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llava_ray.errors import TrainingError
from llava_ray.model import load_model
from llava_ray.train.deepspeed_engine import TrainState
from llava_ray.train.flops import count_flops
from llava_ray.train.param_groups import select_trainable, summarize_param_groups
from llava_ray.train.train_step import take_step
from tests.support.train_workers import (
    Scenario,
    make_batches,
    make_config,
    make_eval_batches,
    read_lines,
    read_losses,
    run_gangs,
)

NUM_STEPS = 20
ZEROS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"deepspeed": "zero2.json"},
    "zero2-offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero3": {"zero_stage": 3},
    "zero3-offload": {"zero_stage": 3, "offload": "all"},
}
MEASURED: dict[str, Any] = {
    "eval_datasets": [{"path": "memory"}],
    "eval_steps": 10,
    "num_generations": 2,
    "peak_tflops": 0.001,
}
LORA: dict[str, Any] = {"method": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0}
PARTS: dict[str, dict[str, Any]] = {
    "projector": {"method": "projector", "zero_stage": 2},
    "lora": {**LORA, **MEASURED, "eval_steps": 5},
    "tower": {"train_vision_tower": True, "vision_lr": 1e-4, "mm_projector_lr": 1e-3},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all runs of this file: one gang of one process, one of two."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [
        Scenario("alone", {"zero_stage": 2, **MEASURED}, num_steps=NUM_STEPS),
        *(Scenario(f"alone-{name}", settings, num_steps=5) for name, settings in PARTS.items()),
        Scenario("qlora", {**LORA, "quantization": "4bit"}),
        Scenario("leaving", num_steps=5, leaves_at=3),
        Scenario("diverging", {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_ratio": 0}),
    ]
    together = [
        *(
            Scenario(name, {**settings, **MEASURED}, num_steps=NUM_STEPS)
            for name, settings in ZEROS.items()
        ),
        *(
            Scenario(f"two-{name}", {"zero_stage": 3, **settings}, num_steps=5)
            for name, settings in PARTS.items()
        ),
    ]
    run_gangs({1: alone, 2: together}, folder)
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
    lines = read_lines(runs, "zero2", "loss")
    ids = [id_ for line in lines[:6] for id_ in line["sample_ids"]]
    assert sorted(ids) == sorted(f"sample-{number}" for number in range(24))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(runs: Path) -> None:
    said = (runs / "diverging" / "error.txt").read_text()
    assert "the loss of step" in said
    assert "'sample-" in said
    assert "lower learning_rate" in said


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("alone", [10, 20]),
        ("zero2", [10, 20]),
        ("zero3", [10, 20]),
        ("alone-lora", [5]),
        ("two-lora", [5]),  # ZeRO 3
    ],
)
def test_the_held_out_loss_is_that_of_the_checkpoint_as_it_loads(
    runs: Path, name: str, steps: list[int]
) -> None:
    said = read_lines(runs, name, "eval_loss")
    assert [line["step"] for line in said] == steps
    checkpoint = runs / name / f"checkpoint-{steps[-1]}"
    model: Any = load_model(checkpoint / "model", dtype="float32", device="cpu")
    total, num_learned = 0.0, 0
    config = make_config()
    for batch in make_eval_batches(config, 0, 1, 1):
        inputs = batch.to_tensors()
        num = int((inputs["labels"][:, 1:] != -100).sum())
        total += float(model.model(**inputs).loss.detach()) * num
        num_learned += num
    assert said[-1]["eval_loss"] == pytest.approx(total / num_learned, rel=1e-5)


def test_a_few_held_out_questions_are_answered_alike_on_any_number_of_workers(runs: Path) -> None:
    (_, last), (_, other) = (read_lines(runs, name, "answers") for name in ("alone", "zero3"))
    assert last["answers"] == other["answers"]
    assert [answer["sample_id"] for answer in last["answers"]] == ["sample-24", "sample-25"]
    answer = last["answers"][0]
    assert "how many are there in number 24?" in answer["prompt"]
    assert answer["right"] == "there are very very very very many, 168 at least"
    assert answer["said"].startswith("there ")


def test_the_log_says_how_much_of_the_hardware_is_used(runs: Path) -> None:
    line = read_lines(runs, "zero2", "loss")[-1]
    parts = summarize_param_groups(_load_trained(), make_config())
    flops = count_flops(parts) * line["tokens_per_s"]
    assert line["mfu"] == pytest.approx(flops / (2 * 1e9), rel=0.01)


def _load_trained() -> Any:
    """Return the tiny model with the parts trainable that these runs train."""
    model: Any = load_model(make_config().model, dtype="float32", device="cpu").model
    select_trainable(model, make_config())
    return model


class _FullEngine:
    """DeepSpeed's engine on a device whose memory is used up."""

    optimizer = SimpleNamespace(param_groups=[])

    def __call__(self, **inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_step_that_does_not_fit_into_memory_says_what_to_lower(tmp_path: Path) -> None:
    core: Any = SimpleNamespace(model=SimpleNamespace(dtype=torch.float32))
    state = TrainState(core, _FullEngine(), {}, [], 0, torch.device("cpu"))
    batches = make_batches(make_config(), 0, 1, None)
    batch = next(batch for batch in batches if "pixel_values" in batch.arrays)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        with pytest.raises(TrainingError, match="lower per_device_train_batch_size"):
            take_step(state, [batch], step=1, rate=1.0, seed=0)
    finally:
        dist.destroy_process_group()


def test_adapters_over_four_bit_weights_learn_and_load(runs: Path) -> None:
    losses = read_losses(runs, "qlora")
    assert losses[-1] < losses[0]
    config = make_config()
    inputs = next(make_eval_batches(config, 0, 1, 1)).to_tensors()
    trained: Any = load_model(runs / "qlora" / "checkpoint-10" / "model", dtype="float32")
    before: Any = load_model(config.model, dtype="float32")
    with torch.inference_mode():
        assert float(trained.model(**inputs).loss) < float(before.model(**inputs).loss)


def test_a_machine_that_will_be_taken_away_leaves_a_checkpoint_at_once(runs: Path) -> None:
    read_losses(runs, "leaving")
    kept = sorted(folder.name for folder in (runs / "leaving").glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-5"]
    load_model(runs / "leaving" / "checkpoint-3" / "model", device="cpu")


COUNT_FAULTS = """
import resource, torch
from llava_ray.train.deepspeed_engine import keep_freed_memory
keep_freed_memory()
for _ in range(10):
    torch.ones(2**24)  # 64 MiB, more than glibc keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep it or not")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    command = [sys.executable, "-c", COUNT_FAULTS]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = map(int, said.split())
    num_pages = 2**26 // resource.getpagesize()
    assert after - before < num_pages / 10
