"""What "auto" precision means, and that training keeps to it."""

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.embedded_model.muon import Muon
from llava_ray.model.loading import select_dtype
from llava_ray.model.precision import choose_dtype

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not CPUINFO.exists() or platform.machine() != "x86_64", reason="reads Linux's list of flags"
)
def test_auto_is_bfloat16_on_a_cpu_that_says_it_has_instructions_for_it():
    flags = CPUINFO.read_text().split()
    has_bfloat16 = "avx512_bf16" in flags or "amx_bf16" in flags
    chosen = select_dtype("auto", torch.device("cpu"))
    assert chosen is choose_dtype("cpu")
    assert chosen is (torch.bfloat16 if has_bfloat16 else torch.float32)


def test_muon_moves_matrices_as_torch_s_does():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((16, 24), (24, 16), (16, 24))]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    muon = Muon(ours, lr=0.05, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [matrix.detach().clone() for matrix in ours]
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        muon.step()
        reference.step()
    for mine, other, start in zip(ours, theirs, before, strict=True):
        moved = (mine - start).norm()
        assert moved > 0.1
        assert (mine - other).norm() < 0.02 * moved  # torch's computes in bfloat16
