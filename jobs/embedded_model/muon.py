"""Muon for CPUs: computes in a fast precision and divides the work between partners.

`torch.optim.Muon` computes in bfloat16, for which a CPU may have no instructions, and repeats the
same work in every process.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from jobs.embedded_model import partners
from llava_ray.model.precision import choose_dtype

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (Jordan et al., 2024), scaled like AdamW's.

    It takes matrices only. Updates are scaled as `match_rms_adamw` does (Liu et al., 2025).
    """

    def __init__(self, params: Any, *, lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix; its gradient must be the same in all partners."""
        assert closure is None
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            for matrix, update in zip(matrices, self._updates(matrices), strict=True):
                reach = 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * reach)

    def _updates(self, matrices: list[nn.Parameter]) -> Iterator[torch.Tensor]:
        """Yield the update of each matrix; each partner computes some, and all receive all."""
        ahead = [self._look_ahead(matrix) for matrix in matrices]
        mine = range(partners.rank(), len(matrices), partners.count())
        updates = [torch.zeros_like(matrix) for matrix in matrices]
        for indices in _alike(ahead, mine):
            stack = orthogonalize(torch.stack([ahead[index] for index in indices]))
            for index, update in zip(indices, stack, strict=True):
                updates[index].copy_(update)
        yield from partners.add_up(updates)

    def _look_ahead(self, matrix: nn.Parameter) -> torch.Tensor:
        """Return the gradient with Nesterov momentum."""
        assert matrix.grad is not None
        state = self.state[matrix]
        momentum = state.setdefault("momentum", torch.zeros_like(matrix))
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)


def _alike(tensors: list[torch.Tensor], indices: Iterable[int]) -> list[list[int]]:
    """Group the indices of tensors by shape."""
    groups = defaultdict(list)
    for index in indices:
        groups[tensors[index].shape].append(index)
    return list(groups.values())


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of matrices [N, R, C] close to 1, by Newton-Schulz iteration."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(choose_dtype("cpu"))
    x = x.mT.contiguous() if is_tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    first, second, third = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first
        )
    return (x.mT if is_tall else x).to(matrices.dtype)
