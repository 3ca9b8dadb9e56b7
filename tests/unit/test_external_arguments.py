"""What vLLM and SGLang are told: what the user has set, and what keeps engines in agreement."""

from pathlib import Path

import pytest

from llava_ray.config import ModelConfig
from llava_ray.engine.external import settings
from llava_ray.engine.external.settings import ExternalEngineKind
from llava_ray.engine.external.sglang_engine import SGLANG
from llava_ray.engine.external.vllm_engine import VLLM
from llava_ray.model.precision import choose_dtype

SIZES = {
    "max_num_seqs",
    "max_running_requests",
    "max_total_tokens",
    "gpu_memory_utilization",
    "mem_fraction_static",
    "model_impl",
}


def describe(kind: ExternalEngineKind, *, on_gpu: bool = True, **options) -> dict:
    config = ModelConfig(engine=kind.name, **options)  # pyright: ignore[reportArgumentType]
    return kind.arguments(config, Path("/model"), on_gpu)


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    monkeypatch.setattr(settings, "read_capability", lambda: (9, 0))


@pytest.mark.parametrize("kind", [VLLM, SGLANG], ids=lambda kind: kind.name)
def test_on_a_gpu_an_engine_keeps_its_own_sizes_until_others_are_set(kind):
    assert not SIZES & set(describe(kind))


def test_sizes_that_are_set_reach_the_engine():
    assert describe(VLLM, max_batch_size=7)["max_num_seqs"] == 7
    told = describe(SGLANG, max_batch_size=7, cache_tokens=640)
    assert (told["max_running_requests"], told["max_total_tokens"]) == (7, 640)


def test_replicas_that_share_a_gpu_take_their_parts_of_its_memory():
    assert describe(VLLM, num_gpus=0.5)["gpu_memory_utilization"] == 0.45
    assert describe(SGLANG, num_gpus=0.5)["mem_fraction_static"] == 0.425


@pytest.mark.parametrize("kind", [VLLM, SGLANG], ids=lambda kind: kind.name)
def test_all_engines_compute_in_the_precision_of_the_torch_engine(kind, monkeypatch):
    assert describe(kind)["dtype"] == "bfloat16"
    assert describe(kind, dtype="float16")["dtype"] == "float16"
    assert describe(kind, on_gpu=False)["dtype"] == str(choose_dtype("cpu")).removeprefix("torch.")
    monkeypatch.setattr(settings, "read_capability", lambda: (7, 5))
    assert describe(kind)["dtype"] == "float16"
