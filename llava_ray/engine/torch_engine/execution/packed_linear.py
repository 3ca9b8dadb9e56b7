"""Packs or quantizes the weights of linear layers once, for the CPU's matmul kernels.

A matmul with an unpacked weight packs it again in every call, which costs more than the matmul
itself for a few tokens. With packed weights, decoding runs at memory bandwidth.

- bfloat16, where the CPU computes in it: oneDNN.
- other CPUs: FBGEMM, which stores weights as float16 and computes in float32. It takes half the
  memory of float32 and is two to five times faster for 1 to 8 tokens. Used only where float16
  represents the weights exactly, as it does for 16-bit checkpoints.
- `quantization=int8`: FBGEMM with int8 weights and activations. It takes a quarter of float32's
  memory and is 1.5 times as fast as float16; outputs are off by one to two percent.
"""

import warnings
from collections.abc import Callable

import torch
from torch import nn

from llava_ray.errors import ConfigError
from llava_ray.model.precision import has_fast_bfloat16

_EXACT_TO = 2.0**-25
"""Largest error accepted as exact: half the spacing of float16's subnormal numbers."""

_HIGHEST = 63
"""Activations are quantized to 7 bits (1 to 127): vpmaddubsw adds two products of an activation and
a weight, and would saturate at 2^15."""

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

    The original weights are freed, except one that is tied to the embedding.
    """
    _replace_linears(module, _pack)


def quantize_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` on a CPU by one that computes in int8, in place.

    Weights have one scale per output channel, activations one per token, so that the result for a
    token does not depend on the other tokens.

    Raises:
        ConfigError: the model is not on a CPU, or the CPU lacks AVX2.
    """
    if next(module.parameters()).device.type != "cpu":
        raise ConfigError("quantization=int8 is for CPUs: leave it out, or ask for device=cpu")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ConfigError("quantization=int8 needs an x86 CPU with AVX2: leave it out")
    _replace_linears(module, _quantize)


def _replace_linears(module: nn.Module, pack: Callable[[nn.Linear], Compute | None]) -> None:
    parents = [each for each in module.modules() if type(each) is not nn.Linear]
    for parent in parents:  # the list holds no linear layer, so each is freed when replaced
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (compute := pack(child)):
                setattr(parent, name, PackedLinear(child, compute))


def widen(module: nn.Module) -> None:
    """Convert a module on a CPU to float32, in place, if the CPU is slow in bfloat16.

    Call it after `pack_linears`: packed weights stay in 16 bits, and little else remains.
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
