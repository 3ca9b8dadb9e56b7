"""Checkpoints: going on gives the very same losses, and each one loads as a model by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_ray.model import load_model
from llava_ray.model.export.export import export_model
from tests.support.tiny_checkpoint import make_image, tiny_model
from tests.support.train_workers import Scenario, read_losses, run_gang, run_gangs

LORA: dict[str, Any] = {"method": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "projector": {"method": "projector"},
    "lora": {**LORA, "lora_dropout": 0.1},
    "full-zero3": {"zero_stage": 3},
    "lora-zero3": {**LORA, "zero_stage": 3},
}
ALONE = ("full", "projector", "full-zero3", "lora-zero3")
UNEVEN = ("full", "full-zero3")
"""Gone on with by three workers, among whom the batch of four does not divide."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a checkpoint after 5 of 10 steps, and others that go on from it."""
    folder = tmp_path_factory.mktemp("runs")
    first = [
        Scenario(name, {**settings, "save_steps": 5}, num_steps=10)
        for name, settings in METHODS.items()
    ]
    again = [
        Scenario(f"{name}-again", settings, resume=f"{name}/checkpoint-5")
        for name, settings in METHODS.items()
    ]
    alone = [
        Scenario(f"{name}-alone", METHODS[name], resume=f"{name}/checkpoint-5") for name in ALONE
    ]
    other = Scenario("other-method", LORA, resume="full/checkpoint-5")
    run_gang(2, [*first, *again, other], folder)
    uneven = [
        Scenario(f"{name}-uneven", METHODS[name], resume=f"{name}/checkpoint-5") for name in UNEVEN
    ]
    run_gangs({1: alone, 3: uneven}, folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_goes_on_has_the_losses_of_one_that_never_stopped(runs: Path, name: str) -> None:
    assert read_losses(runs, f"{name}-again") == read_losses(runs, name)[5:]


@pytest.mark.parametrize("name", ALONE)
def test_one_worker_goes_on_where_two_stopped(runs: Path, name: str) -> None:
    losses = read_losses(runs, f"{name}-alone")
    assert losses == pytest.approx(read_losses(runs, name)[5:], rel=1e-5)


@pytest.mark.parametrize("name", UNEVEN)
def test_three_workers_go_on_with_a_batch_that_does_not_divide(runs: Path, name: str) -> None:
    losses = read_losses(runs, f"{name}-uneven")
    assert losses == pytest.approx(read_losses(runs, name)[5:], rel=1e-5)


def test_another_method_is_refused(runs: Path) -> None:
    with pytest.raises(AssertionError, match="set method=full"):
        read_losses(runs, "other-method")


@pytest.mark.parametrize("name", METHODS)
def test_every_checkpoint_loads_by_itself_and_exports(
    runs: Path, tmp_path: Path, name: str
) -> None:
    for step in (5, 10):
        model = runs / name / f"checkpoint-{step}" / "model"
        core = load_model(model, dtype="float32", device="cpu")
        assert not torch.equal(compute_logits(core), compute_logits(load(tiny_model())))
        exported = load(export_model(model, tmp_path / f"export-{step}", to="hf"))
        torch.testing.assert_close(compute_logits(exported), compute_logits(core))


def load(folder: Path) -> Any:
    return load_model(folder, dtype="float32", device="cpu")


@torch.inference_mode()
def compute_logits(core: Any) -> torch.Tensor:
    return core.model(**core.encode("<image>\nWhat is this?", [make_image(1)])).logits
