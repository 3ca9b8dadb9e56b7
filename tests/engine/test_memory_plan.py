"""How large the cache and the batch of an engine become; the GPUs are numbers."""

import asyncio

import pytest
import torch

from llava_ray.config import ModelConfig
from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.engine.torch_engine.execution import model_runner
from llava_ray.engine.torch_engine.execution.kv_cache import KVShape
from llava_ray.engine.torch_engine.execution.memory_plan import (
    DeviceMemory,
    check_cache_tokens,
    choose_batch_size,
    choose_cache_tokens,
)
from llava_ray.engine.torch_engine.execution.model_runner import ModelRunner
from llava_ray.engine.torch_engine.scheduling.scheduler import Scheduler
from llava_ray.errors import ConfigError
from llava_ray.model.loading import load_model
from tests.support.engine_requests import answer, load, make_sequence, prompt
from tests.support.tiny_checkpoint import tiny_model

GB = 10**9
LLAVA_7B = KVShape(num_layers=32, num_heads=32, num_kv_heads=32, head_size=128)
TOKEN_BYTES = LLAVA_7B.count_token_bytes(torch.bfloat16)
WEIGHTS = int(14.2 * GB)


def choose(total_gb: float, *, share: float = 1.0, others_gb: float = 0.5) -> int:
    total, others = int(total_gb * GB), int(others_gb * GB)
    memory = DeviceMemory(total, total - others - WEIGHTS, WEIGHTS)
    return choose_cache_tokens(
        memory, step_bytes=GB, token_bytes=TOKEN_BYTES, share=share, most=256 * 4096
    )


def test_a_7b_llava_on_an_h200_computes_64_requests_at_once():
    assert TOKEN_BYTES == 524288
    num_tokens = choose(150)
    scheduler = Scheduler(
        cache_tokens=num_tokens,
        max_batch_size=choose_batch_size(num_tokens),
        prefill_tokens=4096,
    )
    for _ in range(64):
        scheduler.add(make_sequence(length=640, max_tokens=512))
    scheduler.plan()
    assert len(scheduler.running) == 64
    assert num_tokens * TOKEN_BYTES > 100 * GB


def test_a_small_gpu_gets_a_small_cache_and_a_batch_to_match():
    num_tokens = choose(24)
    assert 8000 < num_tokens < 13000
    assert choose_batch_size(num_tokens) == num_tokens // 256


def test_two_replicas_that_share_a_gpu_plan_for_their_parts():
    alone, half = choose(80), choose(80, share=0.5)
    beside_another = choose(80, share=0.5, others_gb=0.5 + 36)
    assert half * TOKEN_BYTES + WEIGHTS + GB <= 0.45 * 80 * GB
    assert beside_another == half < alone


def test_a_cache_is_never_larger_than_what_can_be_used():
    memory = DeviceMemory(150 * GB, 140 * GB, 5 * GB)
    most = 256 * 2048
    assert choose_cache_tokens(memory, step_bytes=0, token_bytes=1000, share=1, most=most) == most


def test_a_gpu_without_room_for_a_cache_is_told_with_its_numbers():
    with pytest.raises(ConfigError, match=r"weights take 13\.22 GiB.*largest step.*engine=vllm"):
        choose(16)


def test_a_size_that_was_set_and_does_not_fit_is_refused_before_it_is_taken():
    memory = DeviceMemory(24 * GB, 9 * GB, 14 * GB)
    check_cache_tokens(memory, num_tokens=16384, token_bytes=TOKEN_BYTES)
    with pytest.raises(ConfigError, match=r"cache_tokens=32768 takes 16\.00 GiB.*below 17152, or"):
        check_cache_tokens(memory, num_tokens=32768, token_bytes=TOKEN_BYTES)


@pytest.mark.parametrize("prefill_tokens", [100, 4])
def test_the_largest_step_is_run_before_the_cache_is_taken(monkeypatch, generate, prefill_tokens):
    """Here on the CPU, which measures nothing."""
    monkeypatch.setattr(model_runner, "can_measure", lambda device: True)
    plans = []
    run = ModelRunner.run
    monkeypatch.setattr(
        ModelRunner, "run", lambda self, plan: plans.append(plan) or run(self, plan)
    )

    def measure(device, compute):
        compute()
        return 1000, DeviceMemory(10**9, 10**9, 0)

    monkeypatch.setattr(model_runner, "measure_step", measure)
    engine = load(prefill_tokens=prefill_tokens, max_batch_size=8, context_length=200)
    largest = plans[0].scheduled
    assert [each.num_tokens for each in largest[1:]] == [1] * 7
    assert sum(each.num_tokens for each in largest) == max(8, prefill_tokens)
    assert engine.stats()["cache_tokens_total"] == 8 * 200 // 64 * 64
    assert asyncio.run(answer(engine, prompt("one"))) == generate(prompt("one"))
    asyncio.run(engine.close())


def test_a_cpu_has_the_sizes_that_are_documented():
    engine = TorchEngine(load_model(tiny_model(), dtype="float32", device="cpu"))
    assert engine.stats()["cache_tokens_total"] == 16384
    assert engine.max_batch_size == 32
    described = ModelConfig.model_fields
    assert "16384 on a CPU" in str(described["cache_tokens"].description)
    assert "32 on a CPU" in str(described["max_batch_size"].description)
    asyncio.run(engine.close())
