"""Attention of single tokens on a GPU; where there is none, Triton interprets it on the CPU."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.attention_reference import HEAD_SIZE, check_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from llava_ray.engine.torch_engine.execution import triton_attention  # noqa: E402 - see above
from llava_ray.engine.torch_engine.execution.cuda_graphs import list_batch_sizes  # noqa: E402


@pytest.mark.parametrize("num_processors", [1, 20, 132])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("window", [None, 7])
def test_each_sequence_sees_its_own_keys_and_no_others(
    num_processors, num_heads, num_kv_heads, window, monkeypatch
):
    monkeypatch.setattr(triton_attention, "_count_processors", lambda device: num_processors)
    check_attention(
        triton_attention.attend_decode,
        dtype=torch.float32,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        window=window,
        device=DEVICE,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2)])
def test_keys_and_values_may_have_16_bits(dtype, num_heads, num_kv_heads):
    if DEVICE == "cpu" and dtype == torch.bfloat16 and num_heads > num_kv_heads:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices")
    check_attention(
        triton_attention.attend_decode,
        dtype=dtype,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        device=DEVICE,
        tolerance=2e-2,
    )


def test_it_is_tried_before_it_is_used(monkeypatch):
    pool = torch.zeros(1, HEAD_SIZE, device=DEVICE)
    shape = {"num_heads": 6, "num_kv_heads": 2, "head_size": HEAD_SIZE}
    assert triton_attention.find_fault(pool, **shape) is None

    def write_zeros(query, keys, values, rows, output, **_):
        output.zero_()

    monkeypatch.setattr(triton_attention, "attend_decode", write_zeros)
    assert "is wrong on this machine" in (triton_attention.find_fault(pool, **shape) or "")

    def fail(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(triton_attention, "attend_decode", fail)
    assert "no such instruction" in (triton_attention.find_fault(pool, **shape) or "")


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llava_ray.engine.torch_engine.execution import triton_attention

capability, number, groups = int(sys.argv[1]), "*" + sys.argv[2], int(sys.argv[3])


def compile(kernel, constants, **types):
    types |= dict.fromkeys(constants, "constexpr")
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(kernel, types, constants), target=target).asm["cubin"]


numbers = dict.fromkeys(["query", "keys", "values"], number)
places = dict.fromkeys(["tokens", "firsts", "sizes", "lengths"], "*i64")
parts = dict.fromkeys(["sums", "highests", "totals"], "*fp32")
counts = dict.fromkeys(["query_stride", "num_kv_heads", "num_groups", "head_size"], "i32")
constants = {"HEAD": 128, "PARTS": 4}
assert compile(
    triton_attention._attend_part,
    constants | {"GROUPS": groups, "STEP": 32},
    scaling="fp32",
    **numbers | places | parts | counts,
)
counts = dict.fromkeys(["token_stride", "head_stride", "num_heads", "head_size"], "i32")
assert compile(
    triton_attention._join_parts, constants, tokens="*i64", output=number, **parts | counts
)
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("number", "groups"), [("bf16", 1), ("bf16", 16), ("fp16", 16)])
def test_it_compiles_for_gpus_that_are_not_here(capability, number, groups):
    """The assembler that comes with Triton takes what it makes of the kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, str(capability), number, str(groups)]
    subprocess.run(command, check=True, env=environment)


@pytest.mark.parametrize("num_kv_heads", [32, 4])
def test_no_batch_size_needs_a_kernel_that_was_not_compiled_at_the_start(num_kv_heads):
    """Triton compiles one for each number of parts."""
    parts = [triton_attention._count_parts(b * num_kv_heads, 132) for b in range(1, 65)]
    assert set(parts) <= {parts[size - 1] for size in list_batch_sizes(64)}
