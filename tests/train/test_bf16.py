"""Training in bfloat16, the precision of GPUs, on two processes of a CPU."""

from pathlib import Path
from typing import Any

import pytest

from llava_ray.train.deepspeed_config import describe_engine, read_stage
from tests.support.train_workers import Scenario, make_config, read_losses, run_gang

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "offload": {"zero_stage": 3, "offload": "all"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    scenarios = [
        Scenario(name, {**settings, "bf16": True}, num_steps=5)
        for name, settings in SETTINGS.items()
    ]
    run_gang(2, scenarios, folder)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_in_bfloat16_are_the_same_under_every_zero(runs: Path, name: str) -> None:
    losses = read_losses(runs, name)
    assert losses == pytest.approx(read_losses(runs, "zero2"), rel=2e-2)
    assert losses[-1] < losses[0]


def test_zero_0_in_bfloat16_is_zero_1(runs: Path) -> None:
    assert read_losses(runs, "zero0") == read_losses(runs, "zero1")
    config = make_config(zero_stage=0)
    for is_bf16, stage in ((True, 1), (False, 0)):
        made = describe_engine(config, num_workers=2, hidden_size=64, is_bf16=is_bf16)
        assert read_stage(made) == stage
