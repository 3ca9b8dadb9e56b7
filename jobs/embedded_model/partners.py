"""Data-parallel processes, called partners, with one core each.

On small matrices two processes with one thread each are faster than one process with two.
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
    """Return the index of this process; 0 without partners."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """Return the number of processes; 1 without partners."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def add_up(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return the sums of the tensors over all partners."""
    if not distributed.is_initialized():
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]


def average_gradients(parameters: Sequence[nn.Parameter], progress: float) -> float:
    """Average gradients over all partners, in place; return their average progress."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    total, *summed = add_up([torch.tensor([progress]), *gradients])
    for parameter, gradient in zip(parameters, summed, strict=True):
        parameter.grad = gradient / count()
    return total.item() / count()
