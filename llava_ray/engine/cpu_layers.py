"""What a layer computes between its products, on a CPU in float32: each in one pass.

torch computes these from several operations, each of which reads and writes all numbers.

Shapes: T tokens, D hidden, I width of the MLP, K kv heads, E head size, R rows of a pool.
"""

import numpy as np
import torch

from llava_ray.engine.compiled import compile_kept, exp
from llava_ray.engine.cpu_attention import to_numpy


def can_compute(states: torch.Tensor) -> bool:
    """Whether `normalise` and `gate` are for such states."""
    return states.device.type == "cpu" and states.dtype == torch.float32 and states.is_contiguous()


def normalise(hidden_TD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the root mean square norm, [T, D]."""
    output_TD = torch.empty_like(hidden_TD)
    _normalise(hidden_TD.numpy(), weight_D.detach().numpy(), np.float32(epsilon), output_TD.numpy())
    return output_TD


def gate(gate_up_TJ: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [T, I], of [T, 2 I]: the gates, then what they let through."""
    tokens, width = gate_up_TJ.shape
    output_TI = gate_up_TJ.new_empty(tokens, width // 2)
    _gate(gate_up_TJ.numpy(), output_TI.numpy())
    return output_TI


def put(pool_RE: torch.Tensor, rows: torch.Tensor, new_TKE: torch.Tensor) -> None:
    """Write keys or values into rows of a pool; rows are integers, [T * K]."""
    _put(to_numpy(pool_RE), rows.numpy(), to_numpy(new_TKE.to(pool_RE.dtype)))


@compile_kept
def _normalise(hidden_TD, weight_D, epsilon, output_TD):
    tokens, size = hidden_TD.shape
    for t in range(tokens):
        squares = np.float32(0)
        for d in range(size):
            squares += hidden_TD[t, d] * hidden_TD[t, d]
        factor = np.float32(1) / np.sqrt(squares / np.float32(size) + epsilon)
        for d in range(size):
            output_TD[t, d] = hidden_TD[t, d] * factor * weight_D[d]


@compile_kept
def _gate(gate_up_TJ, output_TI):
    tokens, width = output_TI.shape
    for t in range(tokens):
        for i in range(width):
            number = gate_up_TJ[t, i]
            divisor = np.float32(1) + exp(min(-number, np.float32(87)))
            output_TI[t, i] = number / divisor * gate_up_TJ[t, width + i]


@compile_kept
def _put(pool_RE, rows, new_TKE):
    tokens, heads, size = new_TKE.shape
    for t in range(tokens):
        for k in range(heads):
            row = rows[t * heads + k]
            for e in range(size):
                pool_RE[row, e] = new_TKE[t, k, e]
