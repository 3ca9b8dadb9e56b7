"""The key-value cache and attention over it: one step of all sequences as one row of tokens.

The runner drives transformers' language model with the tokens of all sequences of a step side by
side ([1, T]); everything in the model but attention treats tokens one by one, and attention comes
here, through transformers' `AttentionInterface`. Keys and values go to the sequence's region of
the cache and are read in place.

Shapes: B sequences, T tokens of the step, S tokens that a sequence attends to, N places in the
cache, H query heads, K kv heads, G = H/K query heads for each kv head, E head size.
"""
# ruff: noqa: N803 (tensors carry their shape as a suffix)

import itertools
import math
import mmap
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from llava_ray.engine.scheduler import Plan

ATTENTION_NAME = "llava_ray_cache"
"""Under this name the attention below is known to transformers."""


class KVCache:
    """Keys and values of all sequences, for every layer.

    On a CPU they are kept in float32: attention of one token to those before it is several times
    faster there than in bfloat16, for which torch has no such kernel on CPUs.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape_KNE = (num_kv_heads, num_tokens, head_size)
        dtype = torch.float32 if device.type == "cpu" else dtype
        self.device = device
        self.num_tokens = num_tokens
        self.keys = [_zeros(shape_KNE, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(shape_KNE, dtype, device) for _ in range(num_layers)]
        self._heads_1K = torch.arange(num_kv_heads, device=device)[None] * num_tokens

    def rows(self, places_T: torch.Tensor) -> torch.Tensor:
        """Return where these places are once heads and places are one dimension: [T * K]."""
        return (places_T[:, None] + self._heads_1K).flatten()

    def store(
        self, layer: int, rows: torch.Tensor, key_KTE: torch.Tensor, value_KTE: torch.Tensor
    ) -> None:
        """Write one layer's keys and values of a step."""
        for pool_KNE, new_KTE in (
            (self.keys[layer], key_KTE),
            (self.values[layer], value_KTE),
        ):
            new = new_KTE.transpose(0, 1).to(pool_KNE.dtype).flatten(0, 1)
            pool_KNE.flatten(0, 1).index_copy_(0, rows, new)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU straight from the system, which gives memory only where it is written."""
    if device.type == "cpu":
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


class Span(NamedTuple):
    """One sequence's part of a step.

    Attributes:
        offset: where its tokens begin in the row of the step.
        length: how many they are.
        start: where its region of the cache begins.
        past: how many tokens of it the cache holds already.
    """

    offset: int
    length: int
    start: int
    past: int


class Lanes:
    """Sequences with one new token each, whose regions begin at equal distances.

    So their keys are one strided view of the cache, and one call of attention serves them all.
    """

    def __init__(self, spans: list[Span], cache: KVCache) -> None:
        self.first = spans[0].start
        self.stride = spans[1].start - spans[0].start if len(spans) > 1 else 0
        lengths = [span.past + 1 for span in spans]
        self.shape_BS = (len(spans), max(lengths))
        self.offsets_B = torch.tensor([span.offset for span in spans], device=cache.device)
        self.mask_B11S = None
        if min(lengths) < max(lengths):
            lengths_B1 = torch.tensor(lengths, device=cache.device)[:, None]
            is_seen_BS = torch.arange(max(lengths), device=cache.device) < lengths_B1
            mask_BS = torch.zeros(self.shape_BS, dtype=cache.keys[0].dtype, device=cache.device)
            self.mask_B11S = mask_BS.masked_fill_(~is_seen_BS, float("-inf"))[:, None, None]

    def view(self, pool_KNE: torch.Tensor) -> torch.Tensor:
        """Return these sequences' part of the cache, [B, K, S, E], without copying it."""
        (lanes, size), (heads, _, head_size) = self.shape_BS, pool_KNE.shape
        by_head, by_place, _ = pool_KNE.stride()
        return pool_KNE.as_strided(
            (lanes, heads, size, head_size),
            (self.stride * by_place, by_head, by_place, 1),
            self.first * by_place,
        )


def group_lanes(spans: list[Span], num_places: int) -> list[list[Span]]:
    """Group spans of one token so that the starts of a group are at equal distances.

    A group is computed up to its longest sequence: very unequal ones are kept apart.
    """
    spans = sorted(spans, key=lambda span: span.start)
    groups: list[list[Span]] = []
    for span in spans:
        group = [*groups[-1], span] if groups else [span]
        lengths = [each.past + 1 for each in group]
        gaps = {b.start - a.start for a, b in itertools.pairwise(group)}
        is_dense = max(lengths) * len(group) <= 1.5 * sum(lengths)
        if len(gaps) == 1 and is_dense and span.start + max(lengths) <= num_places:
            groups[-1] = group
        else:
            groups.append([span])
    return groups


class Step:
    """The layout of one step, handed through the language model to its attention layers."""

    def __init__(self, plan: Plan, cache: KVCache) -> None:
        self.cache = cache
        self.spans: list[Span] = []
        offset = 0
        for sequence, length in plan.pieces:
            assert sequence.cache_start is not None
            past = sequence.num_computed
            self.spans.append(Span(offset, length, sequence.cache_start, past))
            offset += length
        self.num_tokens = offset
        positions = [p for span in self.spans for p in range(span.past, span.past + span.length)]
        starts = [span.start for span in self.spans for _ in range(span.length)]
        self.positions_T = torch.tensor(positions, device=cache.device)
        self.rows = cache.rows(self.positions_T + torch.tensor(starts, device=cache.device))
        singles = [span for span in self.spans if span.length == 1]
        groups = group_lanes(singles, cache.num_tokens)
        self._lanes = [Lanes(group, cache) for group in groups]

    def attend(
        self,
        layer: int,
        query_HTE: torch.Tensor,
        key_KTE: torch.Tensor,
        value_KTE: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, let each token attend to its own sequence.

        Args:
            window: each token sees this many tokens up to itself (sliding window); None: all.

        Returns:
            [T, H, E]
        """
        self.cache.store(layer, self.rows, key_KTE, value_KTE)
        keys_KNE, values_KNE = self.cache.keys[layer], self.cache.values[layer]
        query_THE = query_HTE.transpose(0, 1)
        output_THE = torch.empty_like(query_THE)
        for lanes in self._lanes if window is None else ():
            query_BHE = query_THE[lanes.offsets_B]
            output_THE[lanes.offsets_B] = _attend_lanes(
                query_BHE, lanes.view(keys_KNE), lanes.view(values_KNE), scaling, lanes.mask_B11S
            )
        for offset, length, start, past in self.spans:
            if length == 1 and window is None:
                continue
            new = slice(offset, offset + length)
            if past == 0 and window is None:
                key, value, mask_TS = key_KTE[:, new], value_KTE[:, new], None
            else:
                first = max(0, past + 1 - window) if window else 0
                seen = slice(start + first, start + past + length)
                key, value = keys_KNE[:, seen], values_KNE[:, seen]
                mask_TS = _mask(length, past + length - first, window, query_HTE.device)
            output_THE[new] = _attend_span(query_HTE[:, new], key, value, scaling, mask_TS)
        return output_THE


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Step,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, H, T, E], [1, K, T, E] -> [1, T, H, E]."""
    output_THE = step.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        scaling=scaling,
        window=sliding_window,
    )
    return output_THE.to(query.dtype)[None], None


def _attend_lanes(
    query_BHE: torch.Tensor,
    key_BKSE: torch.Tensor,
    value_BKSE: torch.Tensor,
    scaling: float,
    mask_B11S: torch.Tensor | None,
) -> torch.Tensor:
    """One token a sequence: query heads that share a kv head are like tokens that see the same."""
    num_lanes, num_kv_heads, _, head_size = key_BKSE.shape
    query_BKGE = query_BHE.reshape(num_lanes, num_kv_heads, -1, head_size)
    output_BKGE = F.scaled_dot_product_attention(
        query_BKGE.to(key_BKSE.dtype), key_BKSE, value_BKSE, attn_mask=mask_B11S, scale=scaling
    )
    return output_BKGE.reshape(query_BHE.shape).to(query_BHE.dtype)


def _attend_span(
    query_HTE: torch.Tensor,
    key_KSE: torch.Tensor,
    value_KSE: torch.Tensor,
    scaling: float,
    mask_TS: torch.Tensor | None,
) -> torch.Tensor:
    """Several tokens of one sequence; without a mask its first, causal among themselves."""
    num_groups = query_HTE.shape[0] // key_KSE.shape[0]
    key_HSE = key_KSE.to(query_HTE.dtype).repeat_interleave(num_groups, dim=0)
    value_HSE = value_KSE.to(query_HTE.dtype).repeat_interleave(num_groups, dim=0)
    output_1HTE = F.scaled_dot_product_attention(
        query_HTE[None],
        key_HSE[None],
        value_HSE[None],
        attn_mask=mask_TS,
        is_causal=mask_TS is None,
        scale=scaling,
    )
    return output_1HTE[0].transpose(0, 1)


def _mask(length: int, size: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[T, S], True where the last `length` of `size` tokens may look."""
    mask_TS = torch.ones(length, size, dtype=torch.bool, device=device)
    mask_TS = mask_TS.tril(size - length)
    return mask_TS.triu(size - length - window + 1) if window else mask_TS
