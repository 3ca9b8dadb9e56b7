"""Attention of one new token a sequence on a CPU: keys and values read once, at memory's speed.

While a batch decodes, attention reads all keys and values of all its sequences for little
arithmetic. torch's own operation packs them first as for a large product and reaches half the rate
at which memory could give them. This one is compiled by Numba when it is first called, and kept
beside this file, else in the user's cache, else for the process alone.

Shapes: B sequences, N places of the cache, H query heads, K kv heads, E head size.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload

_MAX_PARTS = 8
"""Threads that share a call: they meet twelve to forty times a step."""
_MIN_READ = 1 << 20
"""Bytes of keys and values below which a second thread costs more than it saves."""


class Rows(NamedTuple):
    """Where the keys and values of B sequences are in a pool of [N * K, E]; integers, [B].

    Attributes:
        firsts: the row of each one's first kv head and first token to be seen.
        sizes: rows from one of its kv heads to the next.
        lengths: tokens to be seen.
    """

    firsts: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray


def attend_rows(
    query_BHE: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    *,
    num_kv_heads: int,
    scaling: float,
) -> torch.Tensor:
    """Let one token of each sequence attend to its own keys and values.

    Args:
        query_BHE: any floating dtype.
        keys: a layer's pool, [N * K, E], float32 or bfloat16.
        values: likewise.

    Returns:
        [B, H, E], float32
    """
    query_BHE = query_BHE.float().contiguous()
    output_BHE = torch.empty_like(query_BHE)

    def compute(begin: int, end: int) -> None:
        _attend(
            query_BHE.numpy(), _to_numpy(keys), _to_numpy(values), *rows, num_kv_heads,
            np.float32(scaling), output_BHE.numpy(), begin, end,
        )  # fmt: skip

    num_tasks = query_BHE.shape[0] * num_kv_heads
    num_read = 2 * int(rows.lengths.sum()) * num_kv_heads * keys.shape[1] * keys.itemsize
    num_parts = max(1, min(torch.get_num_threads(), _MAX_PARTS, num_tasks, num_read // _MIN_READ))
    bounds = [num_tasks * i // num_parts for i in range(num_parts + 1)]
    first, *others = itertools.pairwise(bounds)
    running = [_get_helpers().submit(compute, *each) for each in others]
    compute(*first)
    for each in running:
        each.result()
    return output_BHE


def _to_numpy(pool: torch.Tensor) -> np.ndarray:
    """Return a view of a pool; NumPy has no bfloat16, so its bits."""
    return (pool.view(torch.uint16) if pool.dtype == torch.bfloat16 else pool).numpy()


@cache
def _get_helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MAX_PARTS - 1, thread_name_prefix="attend")


def _widen(number: np.generic) -> np.float32:
    """Return a number of a pool as float32; the bits of a bfloat16 are the upper half of one."""
    raise NotImplementedError  # compiled code only


@overload(_widen)
def _compile_widen(number):  # Numba wants no annotations
    if isinstance(number, types.Integer):
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function when it is first called; kept for others where there is a place."""
    options: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


@_compile
def _attend(
    query_BHE, keys, values, firsts, sizes, lengths, num_kv_heads, scaling, output_BHE, begin, end
):  # fmt: skip
    """Compute tasks `begin` to `end`; task i is kv head i % K of sequence i // K."""
    _, num_heads, head_size = query_BHE.shape
    num_groups = num_heads // num_kv_heads
    weights = np.empty(lengths.max(), np.float32)
    sums = np.empty(head_size, np.float32)
    for task in range(begin, end):
        b, kv_head = divmod(task, num_kv_heads)
        length = lengths[b]
        first = firsts[b] + kv_head * sizes[b]
        for head in range(kv_head * num_groups, (kv_head + 1) * num_groups):
            highest = np.float32(-3e38)
            for s in range(length):
                score = np.float32(0)
                for e in range(head_size):
                    score += query_BHE[b, head, e] * _widen(keys[first + s, e])
                score *= scaling
                weights[s] = score
                highest = max(highest, score)
            total = np.float32(0)
            for s in range(length):
                weights[s] = np.exp(weights[s] - highest)
                total += weights[s]
            sums[:] = 0
            for s in range(length):
                weight = weights[s]
                for e in range(head_size):
                    sums[e] += weight * _widen(values[first + s, e])
            for e in range(head_size):
                output_BHE[b, head, e] = sums[e] / total
