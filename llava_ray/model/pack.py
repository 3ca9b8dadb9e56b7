"""Rearranges weights once, for the CPU's matrix kernels.

A product with a plain weight rearranges it anew in every call, which costs more than the product
itself while few tokens are computed. Packed once, decoding reads weights at the speed of memory.

- bfloat16, where the CPU computes in it: oneDNN.
- float32, elsewhere: FBGEMM, which reads weights as float16 and computes in float32. Half the
  memory, two to five times faster at 1 to 8 tokens. Taken only where float16 holds the weights as
  they are, as it does those of checkpoints in 16 bits.
"""

from collections.abc import Callable

import torch
from torch import nn

_EXACT_TO = 2.0**-25
"""Half the distance of the smallest numbers in float16: what becomes of weights near 0."""


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` computes, for inference only.

    Args:
        compute: its product, bias included.
    """

    def __init__(self, linear: nn.Linear, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.dtype = linear.weight.dtype
        self._compute = compute

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self._compute(states)


def pack_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` on a CPU by its packed form, in place, where there is one.

    The original weights are let go, but for one that is also an embedding.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (compute := _pack(child)):
                setattr(parent, name, PackedLinear(child, compute))


def _pack(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor] | None:
    weight, bias = linear.weight.detach(), linear.bias
    if weight.device.type != "cpu":
        return None
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda states: torch.ops.mkldnn._linear_pointwise(
            states, packed, bias, "none", [], ""
        )
    if weight.dtype == torch.float32 and _fits_float16(weight):
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda states: torch.ops.quantized.linear_dynamic_fp16(states, packed)
    return None


def _fits_float16(weight: torch.Tensor) -> bool:
    has_kernels = "fbgemm" in torch.backends.quantized.supported_engines
    return has_kernels and bool((weight.half().float() - weight).abs().max() <= _EXACT_TO)
