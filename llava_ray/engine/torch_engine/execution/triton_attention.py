"""Decode attention on a GPU: one new token of each sequence, in one call for the whole batch.

While a batch decodes, its sequences differ in length and lie anywhere in the cache. torch's own
operation needs them at equal distances and computes all of them up to the longest. Here each
sequence is read up to its own length, in parts that run in parallel and are joined afterwards, so
that a few long sequences keep a whole GPU busy as well (Flash-Decoding). No number is needed on the
host: a call can be recorded in a CUDA graph and replayed with other lengths.

Shapes: T tokens of a step, B sequences, N slots of the cache, H query heads, K kv heads, G = H/K
query heads for each kv head, E head size, P parts, S tokens read at once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports] - only where there is a GPU
import triton.language as tl  # pyright: ignore[reportMissingImports]

from llava_ray.engine.torch_engine.execution.attention_metadata import DecodeMetadata, KVRows


def _compile(kernel: Callable[..., None]) -> Any:
    """Return a kernel, called as `kernel[grid](...)`; triton.jit's return type has no such call."""
    return triton.jit(kernel)


_READ_AT_ONCE = 32
_MIN_DOT = 16
"""The fewest rows and columns that `tl.dot` takes."""
_MAX_PARTS = 16
_PROGRAMS_PER_PROCESSOR = 2


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
        query_THE: queries of all tokens of the step.
        keys: a layer's pool of keys, [N * K, E].
        values: a layer's pool of values, [N * K, E].
        rows: which token and which rows of the pools belong to each sequence.
        output_THE: written in place; rows of other tokens are left unchanged.
    """
    _, num_heads, head_size = output_THE.shape
    if query_THE.stride()[1:] != (head_size, 1):
        query_THE = query_THE.contiguous()
    batch, num_groups = len(rows.tokens), num_heads // num_kv_heads
    parts = _count_parts(batch * num_kv_heads, _count_processors(output_THE.device))
    sums = torch.empty(
        batch, num_heads, parts, head_size, dtype=torch.float32, device=output_THE.device
    )
    measures = torch.empty(2, batch, num_heads, parts, dtype=torch.float32, device=sums.device)
    block = triton.next_power_of_2(head_size)
    with torch.cuda.device_of(output_THE):  # Triton uses the current device
        _attend_part[batch, num_kv_heads, parts](
            query_THE, keys, values, *rows, sums, measures[0], measures[1],
            query_THE.stride(0), scaling, num_kv_heads, num_groups, head_size,
            GROUPS=1 if num_groups == 1 else max(_MIN_DOT, triton.next_power_of_2(num_groups)),
            HEAD=max(block, _MIN_DOT), STEP=_READ_AT_ONCE, PARTS=parts,
        )  # fmt: skip
        _join_parts[batch, num_heads](
            sums, measures[0], measures[1], rows.tokens, output_THE, output_THE.stride(0),
            output_THE.stride(1), num_heads, head_size, HEAD=block, PARTS=parts,
        )  # fmt: skip


def find_fault(
    like: torch.Tensor, *, num_heads: int, num_kv_heads: int, head_size: int
) -> str | None:
    """Return why `attend_decode` does not work on this machine; None: it does.

    It is compared with torch's own operation on random numbers.

    Args:
        like: a tensor of the pools' dtype and device.
    """
    num_slots = 96
    random = torch.Generator(like.device).manual_seed(0)
    kind = {"dtype": like.dtype, "device": like.device}
    keys, values = torch.randn(2, num_slots * num_kv_heads, head_size, generator=random, **kind)
    query_THE = torch.randn(2, num_heads, head_size, generator=random, **kind)
    output_THE = torch.empty_like(query_THE)
    numbers = torch.tensor([[1, 0], [64, 0], [32, 64], [20, 50]], device=like.device)
    rows = DecodeMetadata(*numbers, num_kv_heads=num_kv_heads).find_rows(None)
    try:
        attend_decode(
            query_THE, keys, values, rows, output_THE, num_kv_heads=num_kv_heads, scaling=0.1
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a compiler raises what it likes
        return f"Triton fails: {error}"
    for token, start, size, length in numbers.T.tolist():
        mine = slice(start * num_kv_heads, (start + size) * num_kv_heads)
        key_KSE, value_KSE = (
            pool[mine].view(num_kv_heads, size, head_size)[:, :length].float()
            for pool in (keys, values)
        )
        expected_HE = F.scaled_dot_product_attention(
            query_THE[token].float()[None, :, None],
            key_KSE[None],
            value_KSE[None],
            scale=0.1,
            enable_gqa=True,
        )[0, :, 0]
        if not torch.allclose(output_THE[token].float(), expected_HE, rtol=2e-2, atol=2e-2):
            return "Triton's result is wrong on this machine"
    return None


def _count_parts(programs: int, processors: int) -> int:
    """Return into how many parts to split each sequence so that every multiprocessor is busy.

    The result is a power of two, as Triton's block sizes have to be.
    """
    missing = _PROGRAMS_PER_PROCESSOR * processors // programs
    return min(_MAX_PARTS, 1 << max(0, missing.bit_length() - 1))


@cache
def _count_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@_compile
def _attend_part(
    query, keys, values, tokens, firsts, sizes, lengths, sums, highests, totals,
    query_stride, scaling, num_kv_heads, num_groups, head_size,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute one part of one sequence's tokens for the query heads of one kv head."""
    b, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b)
    part_length = tl.cdiv(tl.cdiv(length, PARTS), STEP) * STEP
    begin = part * part_length
    end = tl.minimum(begin + part_length, length)
    first = tl.load(firsts + b) + kv_head * tl.load(sizes + b)
    token = tl.load(tokens + b)
    e = tl.arange(0, HEAD)
    g = tl.arange(0, GROUPS)
    in_head = e < head_size
    head = kv_head * num_groups + g
    is_query = (g < num_groups)[:, None] & in_head[None, :]
    offsets_GE = token * query_stride + head[:, None] * head_size + e[None, :]
    query_GE = tl.load(query + offsets_GE, mask=is_query, other=0.0)
    highest_G = tl.full([GROUPS], float("-inf"), tl.float32)
    total_G = tl.zeros([GROUPS], tl.float32)
    sum_GE = tl.zeros([GROUPS, HEAD], tl.float32)
    for start in range(begin, end, STEP):
        s = start + tl.arange(0, STEP)
        is_seen = s < end
        cells = (first + s)[:, None] * head_size + e[None, :]
        is_loaded = is_seen[:, None] & in_head[None, :]
        key_SE = tl.load(keys + cells, mask=is_loaded, other=0.0)
        value_SE = tl.load(values + cells, mask=is_loaded, other=0.0)
        if GROUPS == 1:
            product_SE = query_GE.to(tl.float32) * key_SE.to(tl.float32)
            score_GS = tl.sum(product_SE, 1)[None, :]
        else:
            score_GS = tl.dot(query_GE.to(key_SE.dtype), tl.trans(key_SE), input_precision="ieee")
        score_GS = tl.where(is_seen[None, :], score_GS * scaling, float("-inf"))
        new_highest_G = tl.maximum(highest_G, tl.max(score_GS, 1))
        weight_GS = tl.exp(score_GS - new_highest_G[:, None])
        fading_G = tl.exp(highest_G - new_highest_G)
        if GROUPS == 1:
            new_GE = tl.sum(tl.trans(weight_GS) * value_SE.to(tl.float32), 0)[None, :]
        else:
            new_GE = tl.dot(weight_GS.to(value_SE.dtype), value_SE, input_precision="ieee")
        sum_GE = sum_GE * fading_G[:, None] + new_GE
        total_G = total_G * fading_G + tl.sum(weight_GS, 1)
        highest_G = new_highest_G
    places_G = (b * num_kv_heads * num_groups + head) * PARTS + part
    tl.store(highests + places_G, highest_G, mask=g < num_groups)
    tl.store(totals + places_G, total_G, mask=g < num_groups)
    tl.store(sums + places_G[:, None] * head_size + e[None, :], sum_GE, mask=is_query)


@_compile
def _join_parts(
    sums, highests, totals, tokens, output, token_stride, head_stride, num_heads, head_size,
    HEAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Join the parts of one query head of one sequence; parts without tokens have weight 0."""
    b, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, HEAD)
    part = (b * num_heads + head) * PARTS + tl.arange(0, PARTS)
    in_head = e < head_size
    highest_P = tl.load(highests + part)
    weight_P = tl.exp(highest_P - tl.max(highest_P, 0))
    total = tl.sum(tl.load(totals + part) * weight_P, 0)
    cells = part[:, None] * head_size + e[None, :]
    sum_PE = tl.load(sums + cells, mask=in_head[None, :], other=0.0)
    result_E = tl.sum(sum_PE * weight_P[:, None], 0) / total
    place = tl.load(tokens + b) * token_stride + head * head_stride
    tl.store(output + place + e, result_E.to(output.dtype.element_ty), mask=in_head)
