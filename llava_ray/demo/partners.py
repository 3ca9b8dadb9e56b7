"""Processes that train one model together, each on a core of its own.

On small matrices two processes of one thread do more than one process of two threads.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed, multiprocessing, nn


def run_together(function: Callable[..., None], *args: Any, partners: int, **options: Any) -> None:
    """Call `function(*args, **options)` in `partners` processes that can average gradients."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"{folder}/meeting"
        multiprocessing.spawn(_join, (partners, meeting, function, args, options), nprocs=partners)


def _join(
    rank: int,
    partners: int,
    meeting: str,
    function: Callable[..., None],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(meeting, partners)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=partners)
    try:
        function(*args, **options)
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Which partner this process is; 0 alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def average_gradients(parameters: Sequence[nn.Parameter], progress: float) -> float:
    """Average the gradients of all partners in place, and how far each thinks it has come."""
    if not distributed.is_initialized():
        return progress
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([torch.tensor([progress]), *(g.flatten() for g in gradients)])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    averaged = flat[1:].split([gradient.numel() for gradient in gradients])
    for parameter, gradient in zip(parameters, averaged, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return flat[0].item()
