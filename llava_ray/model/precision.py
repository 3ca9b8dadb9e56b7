"""In which precision a device computes fast: what dtype "auto" means."""

import torch


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Return whether a device multiplies bfloat16 matrices in hardware."""
    if torch.device(device).type != "cpu":
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not _emulates_bfloat16()


def choose_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype that "auto" stands for: bfloat16 where it is fast, float32 elsewhere."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def _emulates_bfloat16() -> bool:
    """Return whether oneDNN accepts bfloat16 only by converting it: x86 without BF16 or AMX."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT"))
    return is_x86 and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
