"""What a layer computes between its products on a CPU is what torch computes."""

import pytest
import torch
import torch.nn.functional as F

from llava_ray.engine.cpu_layers import can_compute, gate, normalise, put


@pytest.mark.parametrize("num_tokens", [1, 7, 130])
@pytest.mark.parametrize("size", [16, 100, 768])
@torch.inference_mode()
def test_norms_are_torch_s(num_tokens: int, size: int) -> None:
    torch.manual_seed(0)
    hidden_TD, weight_D = 30 * torch.randn(num_tokens, size), torch.randn(size)
    kept = hidden_TD.clone()
    expected_TD = F.rms_norm(hidden_TD, (size,), weight_D, 1e-5)
    torch.testing.assert_close(normalise(hidden_TD, weight_D, 1e-5), expected_TD)
    assert torch.equal(hidden_TD, kept)
    zeros = torch.zeros(num_tokens, size)
    assert torch.equal(normalise(zeros, weight_D, 1e-5), zeros)


@pytest.mark.parametrize("num_tokens", [1, 7, 130])
@torch.inference_mode()
def test_gates_are_torch_s_for_numbers_of_all_sizes(num_tokens: int) -> None:
    torch.manual_seed(0)
    gate_up_TJ = torch.randn(num_tokens, 2 * 100) * torch.logspace(-4, 4, 200)[torch.randperm(200)]
    gate_TI, up_TI = gate_up_TJ.chunk(2, -1)
    torch.testing.assert_close(gate(gate_up_TJ), F.silu(gate_TI) * up_TI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_keys_arrive_in_their_rows_and_nowhere_else(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pool_RE = torch.randn(100, 16).to(dtype)
    new_TKE = torch.randn(5, 6, 16)[:, 2:5]  # a part of wider rows, as it comes from a product
    rows = torch.randperm(100)[:15]
    expected_RE = pool_RE.index_copy(0, rows, new_TKE.flatten(0, 1).to(dtype))
    put(pool_RE, rows, new_TKE)
    assert torch.equal(pool_RE, expected_RE)


def test_only_float32_on_a_cpu_is_computed_so() -> None:
    assert can_compute(torch.ones(3, 4))
    assert not can_compute(torch.ones(3, 4, dtype=torch.bfloat16))
    assert not can_compute(torch.ones(3, 4).T)
    assert not can_compute(torch.ones(3, 4, device="meta"))
