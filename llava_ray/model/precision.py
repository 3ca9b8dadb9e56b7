"""Which precision is fast where: the one place that decides what "auto" means.

A CPU without instructions for bfloat16 (AVX-512 BF16 or AMX on x86, BF16 on Arm) computes in it an
order of magnitude slower than in float32.
"""

import torch


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Does a device multiply bfloat16 matrices in hardware?"""
    if torch.device(device).type != "cpu":
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not _emulates_bfloat16()


def _emulates_bfloat16() -> bool:
    """oneDNN also takes bfloat16 on AVX-512 without BF16, and converts it on the way."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT"))
    return is_x86 and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def choose_dtype(device: torch.device | str) -> torch.dtype:
    """What "auto" means: bfloat16 where it is fast, float32 elsewhere."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
