"""Attention of one new token a sequence on a CPU: keys and values read once, at memory's speed.

While a batch decodes, attention reads all keys and values of all its sequences for little
arithmetic. torch's own operation packs them first as for a large product and reaches half the rate
at which memory could give them.

Shapes: T tokens of a step, B sequences, N places of the cache, H query heads, K kv heads,
E head size.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba.core import types
from numba.extending import overload

from llava_ray.engine.compiled import compile_kept, exp
from llava_ray.engine.rows import Rows

_MAX_PARTS = 8
"""Threads that share a call: they meet twelve to forty times a step."""
_MIN_READ = 1 << 20
"""Bytes of keys and values below which a second thread costs more than it saves."""


def attend_rows(
    query_THE: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Rows,
    output_THE: torch.Tensor,
    *,
    num_kv_heads: int,
    scaling: float,
) -> None:
    """Let one token of each of B sequences attend to its own keys and values.

    Args:
        query_THE: of all tokens of the step; any floating dtype.
        keys: a layer's pool, [N * K, E], float32 or bfloat16.
        values: likewise.
        output_THE: where the result goes; the rows of other tokens stay as they are.
    """
    query, distance = _flatten(query_THE.float())
    places = [each.numpy() for each in rows]
    output = output_THE if _is_written_in_place(output_THE) else output_THE.float().contiguous()

    def compute(begin: int, end: int) -> None:
        _attend(
            query, distance, to_numpy(keys), to_numpy(values), *places, num_kv_heads,
            np.float32(scaling), output.numpy(), begin, end,
        )  # fmt: skip

    num_tasks = len(rows.tokens) * num_kv_heads
    num_read = 2 * int(rows.lengths.sum()) * num_kv_heads * keys.shape[1] * keys.itemsize
    num_parts = max(1, min(torch.get_num_threads(), _MAX_PARTS, num_tasks, num_read // _MIN_READ))
    bounds = [num_tasks * i // num_parts for i in range(num_parts + 1)]
    first, *others = itertools.pairwise(bounds)
    running = [_get_helpers().submit(compute, *each) for each in others]
    compute(*first)
    for each in running:
        each.result()
    if output is not output_THE:
        output_THE.copy_(output)


def _is_written_in_place(output: torch.Tensor) -> bool:
    return output.dtype == torch.float32 and output.is_contiguous()


def _flatten(rows: torch.Tensor) -> tuple[np.ndarray, int]:
    """Return all that rows of tokens span as one flat array, and how far one is from the next.

    So rows that are a part of wider ones need no copy; those that have gaps in themselves do.
    """
    if not rows[:1].is_contiguous():
        rows = rows.contiguous()
    distance, size = rows.stride(0), rows[0].numel()
    return rows.as_strided(((len(rows) - 1) * distance + size,), (1,)).numpy(), distance


def to_numpy(pool: torch.Tensor) -> np.ndarray:
    """Return a view of a pool; NumPy has no bfloat16, so its bits."""
    return (pool.view(torch.uint16) if pool.dtype == torch.bfloat16 else pool).numpy()


@cache
def _get_helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MAX_PARTS - 1, thread_name_prefix="attend")


def _widen(number: np.generic) -> np.float32:
    """Return a number of a pool as float32; the bits of a bfloat16 are the upper half of one."""
    raise NotImplementedError  # compiled code only


@overload(_widen, inline="always")
def _compile_widen(number):  # Numba wants no annotations
    if isinstance(number, types.Integer):
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


@compile_kept
def _attend(
    queries, distance, key_pool, value_pool, tokens, firsts, sizes, lengths, num_kv_heads, scaling,
    output_THE, begin, end,
):  # fmt: skip
    """Compute tasks `begin` to `end`; task i is kv head i % K of sequence i // K."""
    _, num_heads, head_size = output_THE.shape
    num_groups = num_heads // num_kv_heads
    weights = np.empty(lengths.max(), np.float32)
    for task in range(begin, end):
        b, kv_head = divmod(task, num_kv_heads)
        token, length = tokens[b], lengths[b]
        first = firsts[b] + kv_head * sizes[b]
        keys, values = key_pool[first : first + length], value_pool[first : first + length]
        for head in range(kv_head * num_groups, (kv_head + 1) * num_groups):
            place = token * distance + head * head_size
            query, output = queries[place : place + head_size], output_THE[token, head]
            highest = np.float32(-3e38)
            for s in range(length):
                score = np.float32(0)
                for e in range(head_size):
                    score += query[e] * _widen(keys[s, e])
                weights[s] = score * scaling
            for s in range(length):
                highest = max(highest, weights[s])
            total = np.float32(0)
            for s in range(length):
                weights[s] = exp(weights[s] - highest)
                total += weights[s]
            output[:] = 0
            fours = length // 4 * 4
            for s in range(0, fours, 4):  # the output is read and written once for four
                for e in range(head_size):
                    output[e] += (
                        weights[s] * _widen(values[s, e])
                        + weights[s + 1] * _widen(values[s + 1, e])
                        + weights[s + 2] * _widen(values[s + 2, e])
                        + weights[s + 3] * _widen(values[s + 3, e])
                    )
            for s in range(fours, length):
                for e in range(head_size):
                    output[e] += weights[s] * _widen(values[s, e])
            for e in range(head_size):
                output[e] /= total
