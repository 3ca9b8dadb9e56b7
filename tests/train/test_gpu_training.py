"""What training does on GPUs only, as far as it shows without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_ray.model.loading import load_model
from llava_ray.train.deepspeed_engine import make_optimizer
from llava_ray.train.evaluation import _answer
from tests.support.fake_cuda import pretend_gpu
from tests.support.tiny_checkpoint import tiny_model
from tests.support.train_workers import make_batches, make_config


@pytest.fixture(scope="module")
def core():
    return load_model(tiny_model(), dtype="float32", device="cpu")


def test_the_optimizer_is_fused_on_gpu_machines_too(core, monkeypatch):
    """With offload=optimizer it updates tensors of the CPU there."""
    pretend_gpu(monkeypatch)
    optimizer = make_optimizer(core.model, make_config(offload="optimizer"))
    assert optimizer.defaults["fused"] is True


@pytest.mark.parametrize("stage", [2, 3])
def test_under_zero_3_all_workers_generate_until_the_last_is_done(core, monkeypatch, stage):
    told: dict[str, Any] = {}

    def generate(input_ids, **options):
        told.update(options)
        return input_ids

    monkeypatch.setattr(core.model, "generate", generate)
    state: Any = SimpleNamespace(core=core, stage=stage, device=torch.device("cpu"))
    _answer(state, next(make_batches(make_config(train_batch_size=1), 0, 1, None)))
    assert told["synced_gpus"] is (stage == 3)
