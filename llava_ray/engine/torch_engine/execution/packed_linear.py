"""Rearranges weights once, for the CPU's matrix kernels.

A product with a plain weight rearranges it anew in every call, which costs more than the product
itself while few tokens are computed. Packed once, decoding reads weights at the speed of memory.

- bfloat16, where the CPU computes in it: oneDNN.
- elsewhere: FBGEMM, which reads weights as float16 and computes in float32. Half the memory of
  float32, two to five times faster at 1 to 8 tokens. Taken only where float16 holds the weights as
  they are, as it does those of checkpoints in 16 bits.
- int8, where it is asked for: FBGEMM, weights and states in whole numbers. A quarter of float32's
  memory, and half again as fast as float16; the product is off by one to two percent.
"""

import warnings
from collections.abc import Callable

import torch
from torch import nn

from llava_ray.errors import ConfigError
from llava_ray.model.precision import has_fast_bfloat16

_EXACT_TO = 2.0**-25
"""Half the distance of the smallest numbers in float16: what becomes of weights near 0."""

_HIGHEST = 63
"""Of a state in whole numbers, which go from 1 to 127: two products of one and a weight, added up,
stay below 2^15, where the CPU's instruction would cut them off."""

Compute = Callable[[torch.Tensor], torch.Tensor]


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` computes, for inference only.

    Args:
        compute: its product, bias included.
    """

    def __init__(self, linear: nn.Linear, compute: Compute) -> None:
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
    _replace_linears(module, _pack)


def quantize_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` on a CPU by one that computes in int8, in place.

    Weights are rounded with a scale for each output, states with one for each token: what becomes
    of a token depends on no other.

    Raises:
        ConfigError: this machine cannot.
    """
    if next(module.parameters()).device.type != "cpu":
        raise ConfigError("quantization=int8 is for CPUs: leave it out, or ask for device=cpu")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ConfigError("quantization=int8 needs an x86 CPU with AVX2: leave it out")
    _replace_linears(module, _quantize)


def _replace_linears(module: nn.Module, pack: Callable[[nn.Linear], Compute | None]) -> None:
    parents = [each for each in module.modules() if type(each) is not nn.Linear]
    for parent in parents:  # the layers themselves are let go one by one
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (compute := pack(child)):
                setattr(parent, name, PackedLinear(child, compute))


def widen(module: nn.Module) -> None:
    """Let a module on a CPU compute in float32 where that is the faster, in place.

    After `pack_linears`: packed weights stay in 16 bits, of what else there is only little.
    """
    weight = next(module.parameters())
    if weight.device.type == "cpu" and not has_fast_bfloat16():
        module.float()


def _pack(linear: nn.Linear) -> Compute | None:
    weight, bias = linear.weight.detach(), linear.bias
    if weight.device.type != "cpu":
        return None
    if weight.dtype == torch.bfloat16 and has_fast_bfloat16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda states: torch.ops.mkldnn._linear_pointwise(
            states, packed, bias, "none", [], ""
        )
    weight = weight.float()
    if "fbgemm" in torch.backends.quantized.supported_engines and _fits_float16(weight):
        packed = torch.ops.quantized.linear_prepack_fp16(
            weight, None if bias is None else bias.detach().float()
        )
        return lambda states: torch.ops.quantized.linear_dynamic_fp16(states.float(), packed).to(
            states.dtype
        )
    return None


def _quantize(linear: nn.Linear) -> Compute:
    weight = linear.weight.detach().float()
    bias = None if linear.bias is None else linear.bias.detach()
    scales = weight.abs().amax(1).clamp_(min=_EXACT_TO) / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantized tensor creation.*")  # deprecated after 2.13
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, None)

    def compute(states: torch.Tensor) -> torch.Tensor:
        largest = states.abs().amax(-1, keepdim=True).float().clamp_(min=_EXACT_TO)
        output = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            states / largest, 1 / _HIGHEST, _HIGHEST + 1, packed
        )
        output = output.mul_(largest).to(states.dtype)
        return output if bias is None else output.add_(bias)

    return compute


def _fits_float16(weight: torch.Tensor) -> bool:
    return bool((weight.half().float() - weight).abs().max() <= _EXACT_TO)
