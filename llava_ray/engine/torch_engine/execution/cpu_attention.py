"""Attention on a CPU, where torch's own operation is slow.

- One new token for each sequence: decoding reads all keys and values for little arithmetic, so
  memory bandwidth is the limit. torch packs them first, as for a large matmul, and reaches half of
  it. These kernels read them once. In a pure decoding step, the rotary embedding and the writes to
  the cache are part of the same kernel.
- Many tokens of one sequence in bfloat16: torch computes many small matmuls, this module few large
  ones.

Shapes: T tokens of a step or a sequence, S tokens seen, B sequences, N slots of the cache, H query
heads, K kv heads, G = H/K, E head size, C = E/2 pairs.
"""

from typing import NamedTuple

import numba
import numpy as np
import torch

from llava_ray.engine.torch_engine.execution.attention_metadata import KVRows
from llava_ray.engine.torch_engine.execution.numba_ops import (
    OPTIONS,
    compile_cached,
    convert,
    exp,
    flatten,
    is_supported,
    prefetch_row,
    to_numpy,
    widen,
)
from llava_ray.engine.torch_engine.execution.threads import run_in_team

_MAX_SCORES = 1 << 21
"""Maximum number of attention scores in one matmul, so that they stay in the CPU's L2 cache."""
_PREFETCH_TOKENS = 16
"""Prefetch distance, in tokens: the hardware prefetcher of some CPUs reacts too late."""
_MIN_BYTES_PER_THREAD = 1 << 20
"""Bytes of keys and values that a thread must read to be worth starting."""


def attend_decode(
    query_THE: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: KVRows,
    output_THE: torch.Tensor,
    *,
    num_kv_heads: int,
    scaling: float,
) -> None:
    """Let one token of each of B sequences attend to its sequence's keys and values.

    Args:
        query_THE: queries of all tokens of the step; any floating dtype.
        keys: a layer's pool of keys, [N * K, E], float32 or bfloat16.
        values: a layer's pool of values, likewise.
        rows: which token and which rows of the pools belong to each sequence.
        output_THE: written in place; rows of other tokens are left unchanged.
    """
    query, distance = flatten(query_THE if is_supported(query_THE) else query_THE.float())
    pools = to_numpy(keys), to_numpy(values)
    *row_arrays, num_parts = KernelInputs.of(rows, keys, num_kv_heads=num_kv_heads)
    is_written = is_supported(output_THE) and output_THE.is_contiguous()
    output = output_THE if is_written else output_THE.float().contiguous()
    written = to_numpy(output)
    num_tasks = len(rows.tokens) * num_kv_heads

    def compute(part: int) -> None:
        _attend(
            query, distance, *pools, *row_arrays, num_kv_heads, np.float32(scaling), written,
            num_tasks * part // num_parts, num_tasks * (part + 1) // num_parts,
        )  # fmt: skip

    run_in_team(compute, num_parts)
    if output is not output_THE:
        output_THE.copy_(output)


class KernelInputs(NamedTuple):
    """`KVRows` as NumPy arrays for the kernels, and the number of threads that share the work."""

    tokens: np.ndarray
    firsts: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    num_parts: int

    @classmethod
    def of(cls, rows: KVRows, keys: torch.Tensor, *, num_kv_heads: int) -> "KernelInputs":
        """Return the inputs for pools of the shape and dtype of `keys`."""
        num_read = 2 * int(rows.lengths.sum()) * num_kv_heads * keys.shape[1] * keys.itemsize
        most = min(torch.get_num_threads(), len(rows.tokens) * num_kv_heads)
        tokens, firsts, sizes, lengths = (each.numpy() for each in rows)
        return cls(
            tokens, firsts, sizes, lengths, max(1, min(most, num_read // _MIN_BYTES_PER_THREAD))
        )


def rotate_and_attend(
    heads_TX: torch.Tensor,
    rotations_T1C: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    inputs: KernelInputs,
    *,
    num_kv_heads: int,
    scaling: float,
) -> torch.Tensor:
    """Rotate queries and keys of new tokens, store keys and values, attend; [T, H * E].

    Args:
        heads_TX: queries, keys and values of one token of each sequence, [T, (H + 2 K) * E],
            float32 or bfloat16; the two elements of a rotated pair are adjacent.
        rotations_T1C: complex64 with absolute value 1: each token's rotation of each pair.
        keys: a layer's pool of keys, [N * K, E], float32 or bfloat16; the new key is written to the
            last of the rows that its token attends to.
        values: a layer's pool of values, likewise.
        inputs: which rows of the pools belong to each sequence.
    """
    width = heads_TX.shape[1] - 2 * num_kv_heads * keys.shape[1]
    output_TX = heads_TX.new_empty(len(heads_TX), width)
    arrays = [to_numpy(each) for each in (heads_TX, rotations_T1C[:, 0], keys, values, output_TX)]
    *row_arrays, num_parts = inputs
    num_tasks = len(inputs.tokens) * num_kv_heads
    factor = np.float32(scaling)

    def compute(part: int) -> None:
        begin, end = num_tasks * part // num_parts, num_tasks * (part + 1) // num_parts
        _rotate_and_attend(*arrays, *row_arrays, num_kv_heads, factor, begin, end)

    run_in_team(compute, num_parts)
    return output_TX


def can_attend_prompt(query_THE: torch.Tensor) -> bool:
    """Whether `attend_prompt` is faster than torch for these queries: bfloat16 on a CPU."""
    return query_THE.device.type == "cpu" and query_THE.dtype == torch.bfloat16


def attend_prompt(
    query_THE: torch.Tensor,
    key_KSE: torch.Tensor,
    value_KSE: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Let the last T of S tokens of a sequence attend to all up to themselves; [T, H, E].

    Scores are in float32, their softmax in bfloat16.

    Args:
        key_KSE: bfloat16, as are all of these.
        window: each token sees this many tokens up to itself (sliding window); None: all.
    """
    tokens, heads, size = query_THE.shape
    kv_heads, seen, _ = key_KSE.shape
    query_KGTE = query_THE.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    query_KLE = query_KGTE.float().reshape(kv_heads, -1, size) * scaling
    output_KLE = value_KSE.new_empty(query_KLE.shape)
    at_once = max(1, _MAX_SCORES // (query_KLE.shape[1] * seen))
    for begin in range(0, kv_heads, at_once):
        some = slice(begin, begin + at_once)
        scores_KLS = torch.bmm(query_KLE[some], key_KSE[some].float().transpose(1, 2))
        weights_KLS = torch.empty_like(scores_KLS, dtype=torch.bfloat16)
        _softmax(scores_KLS.numpy(), tokens, window or seen, to_numpy(weights_KLS))
        torch.bmm(weights_KLS, value_KSE[some], out=output_KLE[some])
    return output_KLE.view(heads, tokens, size).transpose(0, 1)


@compile_cached
def _attend(
    queries, distance, key_pool, value_pool, tokens, firsts, sizes, lengths, num_kv_heads, scaling,
    output_THE, begin, end,
):  # fmt: skip
    """Compute tasks `begin` to `end`; task i is kv head i % K of sequence i // K."""
    _, num_heads, head_size = output_THE.shape
    num_groups = num_heads // num_kv_heads
    weights = np.empty(lengths.max(), np.float32)
    query, sums = np.empty(head_size, np.float32), np.empty(head_size, np.float32)
    for task in range(begin, end):
        b, kv_head = divmod(task, num_kv_heads)
        token, length = tokens[b], lengths[b]
        first = firsts[b] + kv_head * sizes[b]
        keys, values = key_pool[first : first + length], value_pool[first : first + length]
        for head in range(kv_head * num_groups, (kv_head + 1) * num_groups):
            place = token * distance + head * head_size
            for e in range(head_size):
                query[e] = widen(queries[place + e]) * scaling
            _attend_head(query, keys, values, weights, output_THE[token, head], sums)


@compile_cached
def _rotate_and_attend(
    heads_TX, rotations_TC, key_pool, value_pool, output_TX, tokens, firsts, sizes, lengths,
    num_kv_heads, scaling, begin, end,
):  # fmt: skip
    """Compute tasks `begin` to `end`; task i is kv head i % K of sequence i // K."""
    size = key_pool.shape[1]
    num_heads = output_TX.shape[1] // size
    num_groups = num_heads // num_kv_heads
    weights = np.empty(lengths.max(), np.float32)
    turned, sums = np.empty(size, np.float32), np.empty(size, np.float32)
    for task in range(begin, end):
        b, kv_head = divmod(task, num_kv_heads)
        token, length = tokens[b], lengths[b]
        first = firsts[b] + kv_head * sizes[b]
        keys, values = key_pool[first : first + length], value_pool[first : first + length]
        heads, turns, output = heads_TX[token], rotations_TC[token], output_TX[token]
        place = (num_heads + kv_head) * size
        _rotate(heads[place : place + size], turns, turned)
        place += num_kv_heads * size
        new, new_key, new_value = heads[place : place + size], keys[length - 1], values[length - 1]
        for e in range(size):
            new_key[e] = convert(turned[e], new_key)
            new_value[e] = convert(new[e], new_value)
        for place in range(kv_head * num_groups * size, (kv_head + 1) * num_groups * size, size):
            _rotate(heads[place : place + size], turns, turned)
            for e in range(size):  # rounded exactly as by `cpu_layers.rotate`
                turned[e] = widen(convert(turned[e], heads)) * scaling
            _attend_head(turned, keys, values, weights, output[place : place + size], sums)


@numba.njit(**OPTIONS)
def _rotate(head, turns, turned):
    """Rotate each pair of neighbours of a head by its angle."""
    for c in range(len(turns)):
        one, other = widen(head[2 * c]), widen(head[2 * c + 1])
        turned[2 * c] = one * turns[c].real - other * turns[c].imag
        turned[2 * c + 1] = one * turns[c].imag + other * turns[c].real


@numba.njit(**OPTIONS)
def _attend_head(query, keys, values, weights, output, sums):
    """Compute attention of one query head; `weights` and `sums` are scratch buffers."""
    length, size = keys.shape
    highest = np.float32(-3e38)
    for s in range(length):
        prefetch_row(keys, s + _PREFETCH_TOKENS)
        score = np.float32(0)
        for e in range(size):
            score += query[e] * widen(keys[s, e])
        weights[s] = score
    for s in range(length):
        highest = max(highest, weights[s])
    total = np.float32(0)
    for s in range(length):
        weights[s] = exp(weights[s] - highest)
        total += weights[s]
    sums[:] = 0
    fours = length // 4 * 4
    for s in range(0, fours, 4):  # loads and stores each sum once for four tokens
        for ahead in range(s + _PREFETCH_TOKENS, s + _PREFETCH_TOKENS + 4):
            prefetch_row(values, ahead)
        for e in range(size):
            sums[e] += (
                weights[s] * widen(values[s, e])
                + weights[s + 1] * widen(values[s + 1, e])
                + weights[s + 2] * widen(values[s + 2, e])
                + weights[s + 3] * widen(values[s + 3, e])
            )
    for s in range(fours, length):
        for e in range(size):
            sums[e] += weights[s] * widen(values[s, e])
    for e in range(size):
        output[e] = convert(sums[e] / total, output)


@compile_cached
def _softmax(scores_KLS, tokens, window, weights_KLS):
    """Causal softmax of the scores; row l belongs to token l % T of the last T of S tokens."""
    kv_heads, rows, size = scores_KLS.shape
    for k in range(kv_heads):
        for row in range(rows):
            end = size - tokens + row % tokens + 1
            begin = max(0, end - window)
            scores, weights = scores_KLS[k, row, begin:end], weights_KLS[k, row, begin:end]
            weights_KLS[k, row, :begin] = 0
            weights_KLS[k, row, end:] = 0
            highest = np.float32(-3e38)
            for s in range(len(scores)):
                highest = max(highest, scores[s])
            total = np.float32(0)
            for s in range(len(scores)):
                scores[s] = exp(scores[s] - highest)
                total += scores[s]
            factor = np.float32(1) / total
            for s in range(len(scores)):
                weights[s] = convert(scores[s] * factor, weights)
