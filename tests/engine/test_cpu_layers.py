"""The CPU kernels for a layer's operations between matmuls give what torch gives."""

import pytest
import torch
import torch.nn.functional as F

from llava_ray.engine.torch_engine.execution.cpu_layers import (
    can_compute,
    rms_norm,
    rotate,
    silu_and_mul,
    store_rows,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 130])
@pytest.mark.parametrize("size", [16, 100, 768])
@torch.inference_mode()
def test_norms_are_torch_s(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    torch.manual_seed(0)
    hidden_TD, weight_D = (
        (30 * torch.randn(num_tokens, size)).to(dtype),
        torch.randn(size).to(dtype),
    )
    kept = hidden_TD.clone()
    expected_TD = F.rms_norm(hidden_TD.float(), (size,), weight_D.float(), 1e-5)
    check_near(rms_norm(hidden_TD, weight_D, 1e-5), expected_TD)
    assert torch.equal(hidden_TD, kept)
    zeros = torch.zeros(num_tokens, size, dtype=dtype)
    assert torch.equal(rms_norm(zeros, weight_D, 1e-5), zeros)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 130])
@torch.inference_mode()
def test_gates_are_torch_s_for_numbers_of_all_sizes(dtype: torch.dtype, num_tokens: int) -> None:
    torch.manual_seed(0)
    gate_up_TJ = torch.randn(num_tokens, 2 * 100) * torch.logspace(-4, 4, 200)[torch.randperm(200)]
    gate_up_TJ = gate_up_TJ.to(dtype)
    gate_TI, up_TI = gate_up_TJ.float().chunk(2, -1)
    check_near(silu_and_mul(gate_up_TJ), F.silu(gate_TI) * up_TI)


@pytest.mark.parametrize("num_tokens", [1, 7, 130])
@pytest.mark.parametrize("size", [2, 6, 64])
@torch.inference_mode()
def test_heads_are_turned_as_complex_numbers(num_tokens: int, size: int) -> None:
    torch.manual_seed(0)
    heads_TJE = torch.randn(num_tokens, 5, size).bfloat16()
    rotations_T1C = torch.polar(torch.ones(()), 9 * torch.randn(num_tokens, 1, size // 2))
    kept = heads_TJE.clone()
    pairs = torch.view_as_complex(heads_TJE[:, :3].float().unflatten(-1, (-1, 2)))
    rotate(heads_TJE, rotations_T1C, 3)
    check_near(heads_TJE[:, :3], torch.view_as_real(pairs * rotations_T1C).flatten(2))
    assert torch.equal(heads_TJE[:, 3:], kept[:, 3:])


def check_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """What was found is what was expected in float32, rounded once."""
    ulp = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected, rtol=0.51 * ulp + 2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new_dtype", [*DTYPES, torch.float16])
@torch.inference_mode()
def test_keys_arrive_in_their_rows_and_nowhere_else(
    dtype: torch.dtype, new_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    pool_RE = torch.randn(100, 16).to(dtype)
    new_TKE = torch.randn(5, 6, 16).to(new_dtype)[
        :, 2:5
    ]  # a part of wider rows, as it comes from a product
    rows = torch.randperm(100)[:15]
    expected_RE = pool_RE.index_copy(0, rows, new_TKE.flatten(0, 1).to(dtype))
    store_rows(pool_RE, rows, new_TKE)
    assert torch.equal(pool_RE, expected_RE)


def test_what_is_computed_so() -> None:
    assert can_compute(torch.ones(3, 4))
    assert can_compute(torch.ones(3, 4, dtype=torch.bfloat16))
    assert not can_compute(torch.ones(3, 4, dtype=torch.float16))
    assert not can_compute(torch.ones(3, 4).T)
    assert not can_compute(torch.ones(3, 4, device="meta"))
