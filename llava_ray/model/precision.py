"""In which precision a device computes fast: what dtype "auto" means."""

import torch

FIRST_BFLOAT16 = (8, 0)
"""Compute capability of the first GPUs that multiply bfloat16 matrices in hardware."""


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Return whether a device multiplies bfloat16 matrices in hardware."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= FIRST_BFLOAT16
    if torch.device(device).type != "cpu":
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not _emulates_bfloat16()


def choose_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype that "auto" stands for.

    bfloat16 where it is fast, otherwise float16 on a GPU (T4) and float32 on a CPU.
    """
    if has_fast_bfloat16(device):
        return torch.bfloat16
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def _emulates_bfloat16() -> bool:
    """Return whether oneDNN accepts bfloat16 only by converting it: x86 without BF16 or AMX."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT"))
    return is_x86 and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
