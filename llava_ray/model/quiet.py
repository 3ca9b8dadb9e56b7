"""Contexts for the time in which a model is read or written.

For `core`, `build` and `blocks`: transformers says nothing meanwhile, Python collects nothing.
"""

import contextlib
import gc
import os
from collections.abc import Iterator

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


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal for as long as this lasts.

    It also imports DeepSpeed, where that is installed, to write a model; which remarks that it
    found no GPU, unless it is told so.
    """
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextlib.contextmanager
def no_remarks() -> Iterator[None]:
    """Keep off the terminal what transformers says of weights that are not needed, and the bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def no_collecting() -> Iterator[None]:
    """Put off the collection of garbage.

    A model's many small objects would start it several times, and each time it looks through all
    objects of all packages, which takes longer than reading a small model.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
