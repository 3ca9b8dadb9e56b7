"""Kernels for a layer's operations between its matmuls, on a CPU, in float32 or bfloat16.

torch composes each of these from several operations that read and write all elements. These kernels
make one pass, compute in float32, and round once.

Shapes: T tokens, D hidden, I MLP width, J heads or (for gate and up) 2 I, K kv heads, E head size,
C = E/2 pairs, R rows of a pool.
"""

import numpy as np
import torch

from llava_ray.engine.torch_engine.execution.numba_ops import (
    compile_cached,
    convert,
    exp,
    flatten,
    is_supported,
    round_bits,
    to_numpy,
    widen,
)


def can_compute(states: torch.Tensor) -> bool:
    """Whether `rms_norm` and `silu_and_mul` take such hidden states."""
    return is_supported(states) and states.is_contiguous()


def rms_norm(hidden_TD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return RMSNorm(hidden) * weight, [T, D]."""
    output_TD = torch.empty_like(hidden_TD)
    hidden, weight, output = map(to_numpy, (hidden_TD, weight_D.detach(), output_TD))
    _rms_norm(hidden, weight, np.float32(epsilon), output)
    return output_TD


def silu_and_mul(gate_up_TJ: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [T, I]; the input holds gate and up side by side, [T, 2 I]."""
    tokens, width = gate_up_TJ.shape
    output_TI = gate_up_TJ.new_empty(tokens, width // 2)
    _silu_and_mul(to_numpy(gate_up_TJ), to_numpy(output_TI))
    return output_TI


def rotate(heads_TJE: torch.Tensor, rotations_T1C: torch.Tensor, num_rotated: int) -> None:
    """Rotate each pair of adjacent elements of the first `num_rotated` heads, in place.

    Args:
        heads_TJE: bfloat16. (In float32 torch's complex multiplication is one pass already.)
        rotations_T1C: complex64 with absolute value 1: each token's rotation of each pair.
    """
    rotations_TE = torch.view_as_real(rotations_T1C).flatten(1).numpy()
    _rotate(heads_TJE.flatten(1).view(torch.uint32).numpy(), rotations_TE, num_rotated)


def store_rows(pool_RE: torch.Tensor, rows: torch.Tensor, new_TKE: torch.Tensor) -> None:
    """Write keys or values into rows of a pool; `rows` are their indices, [T * K]."""
    new, distance = flatten(new_TKE if is_supported(new_TKE) else new_TKE.float())
    _store_rows(to_numpy(pool_RE), rows.numpy(), new, distance, len(new_TKE))


@compile_cached
def _rms_norm(hidden_TD, weight_D, epsilon, output_TD):
    tokens, size = hidden_TD.shape
    for t in range(tokens):
        squares = np.float32(0)
        for d in range(size):
            number = widen(hidden_TD[t, d])
            squares += number * number
        factor = np.float32(1) / np.sqrt(squares / np.float32(size) + epsilon)
        for d in range(size):
            number = widen(hidden_TD[t, d]) * factor * widen(weight_D[d])
            output_TD[t, d] = convert(number, output_TD)


@compile_cached
def _silu_and_mul(gate_up_TJ, output_TI):
    tokens, width = output_TI.shape
    for t in range(tokens):
        gates, ups, output = gate_up_TJ[t, :width], gate_up_TJ[t, width:], output_TI[t]
        for i in range(width):
            number = widen(gates[i])
            divisor = np.float32(1) + exp(min(-number, np.float32(87)))
            output[i] = convert(number / divisor * widen(ups[i]), output)


@compile_cached
def _rotate(pairs_TP, rotations_TE, num_rotated):
    tokens, size = rotations_TE.shape
    size //= 2
    for t in range(tokens):
        turns = rotations_TE[t]
        for j in range(num_rotated):
            pairs = pairs_TP[t, j * size : (j + 1) * size]
            for c in range(size):
                pair = pairs[c]
                one = np.uint32(pair << np.uint32(16)).view(np.float32)
                other = np.uint32(pair & np.uint32(0xFFFF0000)).view(np.float32)
                cos, sin = turns[2 * c], turns[2 * c + 1]
                low = round_bits(one * cos - other * sin)
                high = round_bits(one * sin + other * cos)
                pairs[c] = np.uint32(low >> np.uint32(16)) | np.uint32(high & np.uint32(0xFFFF0000))


@compile_cached
def _store_rows(pool_RE, rows, new, distance, tokens):
    size = pool_RE.shape[1]
    heads = len(rows) // tokens
    for t in range(tokens):
        for k in range(heads):
            place = t * distance + k * size
            source, target = new[place : place + size], pool_RE[rows[t * heads + k]]
            for e in range(size):
                target[e] = convert(source[e], pool_RE)
