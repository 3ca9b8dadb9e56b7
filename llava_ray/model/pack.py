"""Rearranges weights once, for the CPU's bfloat16 matrix kernels.

A product with a plain weight rearranges it anew in every call, which costs more than the product
itself while few tokens are computed. Packed once, decoding reads weights at the speed of memory.
"""

import torch
from torch import nn


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` computes, for inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.dtype = linear.weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(states, self._weight, self.bias, "none", [], "")


def pack_linears(module: nn.Module) -> None:
    """Replace every bfloat16 `nn.Linear` on a CPU by its packed form, in place.

    Leaves alone what the kernels are not made for: other precisions, other devices, a torch
    without oneDNN, a weight that is also an embedding.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if (
                type(child) is nn.Linear
                and _is_packable(child)
                and (id(child.weight) not in embeddings)
            ):
                setattr(parent, name, PackedLinear(child))


def _is_packable(linear: nn.Linear) -> bool:
    weight = linear.weight
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
