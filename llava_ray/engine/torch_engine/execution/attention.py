"""Attention over the cache: the tokens of all sequences of a step in one row.

The runner passes the tokens of all sequences of a step to transformers' language model as one row,
[1, T]. Everything in the model but attention treats tokens one by one; attention is computed here,
through transformers' `AttentionInterface`. Keys and values are written to the sequence's slice of
the cache and read in place.

Shapes: B sequences, T tokens of the step, W of them wanted, S tokens that a sequence attends to,
N slots of the cache, H query heads, K kv heads, G = H/K query heads for each kv head, E head size.
"""

import itertools
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from llava_ray.engine.torch_engine.execution import cpu_attention
from llava_ray.engine.torch_engine.execution.attention_metadata import (
    DecodeMetadata,
    KVRows,
    RotateAndAttend,
)
from llava_ray.engine.torch_engine.execution.device_transfer import send
from llava_ray.engine.torch_engine.execution.kv_cache import KVCache
from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVSlice
from llava_ray.engine.torch_engine.scheduling.scheduler import StepPlan

_NUMBERS_IN_16_BYTES = 2

ATTENTION_NAME = "llava_ray_cache"
"""The name under which `attend` below is registered with transformers."""


class Span(NamedTuple):
    """One sequence's part of a step.

    Attributes:
        offset: index of its first token in the row of the step's tokens.
        length: number of its tokens in the step.
        kv_slice: its part of the cache.
        past: how many of its tokens the cache holds already.
        is_prompt: its tokens belong to a prompt. They take the prompt's kernels even if there is
            one only, so that keys and values do not depend on how steps divide the prompt.
    """

    offset: int
    length: int
    kv_slice: KVSlice
    past: int
    is_prompt: bool = False

    @property
    def is_single(self) -> bool:
        """Whether this is one token that the decode kernels compute."""
        return self.length == 1 and not self.is_prompt


class StridedBatch:
    """Sequences with one new token each, whose slices have equal lengths and distances.

    Their keys are therefore one strided view of the cache, and one call of attention serves all.
    """

    def __init__(self, spans: list[Span], cache: KVCache) -> None:
        first = spans[0].kv_slice
        distance = spans[1].kv_slice.start - first.start if len(spans) > 1 else 0
        lengths = [span.past + 1 for span in spans]
        self._heads = cache.num_kv_heads
        self._shape_BS = (len(spans), max(lengths))
        self._start, self._size, self._distance = first.start, first.length, distance
        self._offsets = _index([span.offset for span in spans], cache.device)
        self._mask_B11S = None
        if min(lengths) < max(lengths):
            lengths_B1 = send(lengths, cache.device)[:, None]
            is_seen_BS = torch.arange(max(lengths), device=cache.device) < lengths_B1
            mask_BS = torch.zeros(self._shape_BS, dtype=cache.dtype, device=cache.device)
            self._mask_B11S = mask_BS.masked_fill_(~is_seen_BS, float("-inf"))[:, None, None]

    def attend(
        self,
        query_THE: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output_THE: torch.Tensor,
        *,
        scaling: float,
    ) -> None:
        """Write these sequences' rows of a layer's attention to `output_THE`.

        Query heads that share a kv head are passed as if they were several tokens of one head.
        """
        query_BHE = query_THE[self._offsets]
        query_BKGE = query_BHE.reshape(len(query_BHE), self._heads, -1, query_BHE.shape[2])
        output_BKGE = F.scaled_dot_product_attention(
            query_BKGE.to(keys.dtype),
            self._view(keys),
            self._view(values),
            attn_mask=self._mask_B11S,
            scale=scaling,
        )
        output_THE[self._offsets] = output_BKGE.reshape(query_BHE.shape).to(output_THE.dtype)

    def _view(self, pool: torch.Tensor) -> torch.Tensor:
        """Return these sequences' part of a pool, [B, K, S, E], without copying it."""
        (batch, length), head_size = self._shape_BS, pool.shape[1]
        slot_size = self._heads * head_size  # elements of a pool for each slot of the cache
        return pool.as_strided(
            (batch, self._heads, length, head_size),
            (self._distance * slot_size, self._size * head_size, head_size, 1),
            self._start * slot_size,
        )


def _find_rows(spans: list[Span], positions_T: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Return the rows of the pools into which a step's tokens are written, [T * K]."""
    begins = [
        span.kv_slice.start * cache.num_kv_heads for span in spans for _ in range(span.length)
    ]
    sizes = [span.kv_slice.length for span in spans for _ in range(span.length)]
    begins_T, sizes_T = send([begins, sizes], cache.device)
    heads_K = torch.arange(cache.num_kv_heads, device=cache.device)
    return ((begins_T + positions_T)[:, None] + sizes_T[:, None] * heads_K).flatten()


def _describe(spans: list[Span], cache: KVCache) -> DecodeMetadata:
    """Return the metadata of sequences with one new token each.

    Each row of the tensor begins at a multiple of 16 bytes: Triton would compile a second kernel
    for pointers that do not, at the first step with an odd number of sequences.
    """
    numbers = [(span.offset, *span.kv_slice, span.past + 1) for span in spans]
    numbers += [(0, 0, 0, 0)] * (len(spans) % _NUMBERS_IN_16_BYTES)
    rows = send(torch.tensor(numbers).T.contiguous(), cache.device)[:, : len(spans)]
    return DecodeMetadata(*rows, num_kv_heads=cache.num_kv_heads)


def _index(offsets: list[int], device: torch.device) -> slice | torch.Tensor:
    """Return an index of these tokens of a step: a slice, which copies nothing, where possible."""
    if offsets == list(range(offsets[0], offsets[0] + len(offsets))):
        return slice(offsets[0], offsets[-1] + 1)
    return send(offsets, device)


def group_by_stride(spans: list[Span]) -> list[list[Span]]:
    """Group spans of one token so that a group's slices have equal lengths and distances.

    A group is computed up to its longest sequence, so sequences of very unequal lengths are not
    put into one group.
    """
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.kv_slice):
        group = [*groups[-1], span] if groups else [span]
        lengths = [each.past + 1 for each in group]
        distances = {b.kv_slice.start - a.kv_slice.start for a, b in itertools.pairwise(group)}
        sizes = {each.kv_slice.length for each in group}
        is_dense = max(lengths) * len(group) <= 1.5 * sum(lengths)
        if len(distances) == len(sizes) == 1 and is_dense:
            groups[-1] = group
        else:
            groups.append([span])
    return groups


class StepMetadata:
    """Implements `AttentionMetadata` for any step: where its tokens, keys and values are.

    The wanted tokens are the last tokens of the sequences that are complete with this step.
    """

    def __init__(self, plan: StepPlan, cache: KVCache) -> None:
        spans: list[Span] = []
        offset = 0
        for scheduled in plan.scheduled:
            kv_slice = scheduled.sequence.kv_slice
            assert kv_slice is not None
            is_prompt = scheduled.start < len(scheduled.sequence.prompt_ids)
            spans.append(Span(offset, scheduled.num_tokens, kv_slice, scheduled.start, is_prompt))
            offset += scheduled.num_tokens
        positions = [p for span in spans for p in range(span.past, span.past + span.length)]
        self.positions_T = send(positions, cache.device)
        self.wanted: torch.Tensor | None = None
        self._spans, self._cache = spans, cache
        self._all = self._last = _SpanAttention(spans, cache)
        self._kernel_inputs: dict[int | None, cpu_attention.KernelInputs] = {}
        complete = [
            span
            for span, scheduled in zip(spans, plan.scheduled, strict=True)
            if scheduled.is_complete
        ]
        if len(complete) < offset or any(span.is_prompt for span in spans):
            last = [span.offset + span.length - 1 for span in complete]
            self.wanted = send(last, cache.device, torch.int64)
            self._last = _SpanAttention(
                [
                    Span(index, 1, span.kv_slice, span.past + span.length - 1)
                    for index, span in enumerate(complete)
                ],
                cache,
            )
        is_decode = self.wanted is None and len(spans) == offset
        self.rotate_and_attend: RotateAndAttend | None = None
        if is_decode and cache.device.type == "cpu":
            self.rotate_and_attend = self._rotate_and_attend

    @cached_property
    def _rows(self) -> torch.Tensor:
        return _find_rows(self._spans, self.positions_T, self._cache)

    def _rotate_and_attend(
        self,
        layer: int,
        heads_TX: torch.Tensor,
        rotations_T1C: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """See `RotateAndAttend`."""
        keys, heads = self._cache.keys[layer], self._cache.num_kv_heads
        if window not in self._kernel_inputs:
            inputs = cpu_attention.KernelInputs.of(
                self._all.find_rows(window), keys, num_kv_heads=heads
            )
            self._kernel_inputs[window] = inputs
        return cpu_attention.rotate_and_attend(
            heads_TX,
            rotations_T1C,
            keys,
            self._cache.values[layer],
            self._kernel_inputs[window],
            num_kv_heads=heads,
            scaling=scaling,
        )

    def attend(
        self,
        layer: int,
        query_THE: torch.Tensor,
        key_TKE: torch.Tensor,
        value_TKE: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        is_last: bool = False,
    ) -> torch.Tensor:
        """See `AttentionMetadata.attend`."""
        self._cache.store(layer, self._rows, key_TKE, value_TKE)
        spans = self._last if is_last else self._all
        return spans.attend(layer, query_THE, key_TKE, value_TKE, scaling=scaling, window=window)


class _SpanAttention:
    """Attention of all spans of a step, or of its wanted tokens as spans of one token each."""

    def __init__(self, spans: list[Span], cache: KVCache) -> None:
        self._cache = cache
        self._spans = spans
        decoding = [span for span in spans if span.is_single]
        by_rows = cache.attend_decode is not None
        self._decoding = _describe(decoding, cache) if decoding and by_rows else None
        self._strided = (
            [] if by_rows else [StridedBatch(group, cache) for group in group_by_stride(decoding)]
        )
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def find_rows(self, window: int | None) -> KVRows:
        """Return the rows of the pools that the decoding tokens see; there is at least one."""
        assert self._decoding
        return self._decoding.find_rows(window)

    def attend(
        self,
        layer: int,
        query_THE: torch.Tensor,
        key_TKE: torch.Tensor,
        value_TKE: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Return [T, H, E]. The step's keys and values must be in the cache already."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        output_THE = query_THE.new_empty(query_THE.shape)
        if self._decoding and self._cache.attend_decode:
            self._cache.attend_decode(
                query_THE,
                keys,
                values,
                self._decoding.find_rows(window),
                output_THE,
                num_kv_heads=self._cache.num_kv_heads,
                scaling=scaling,
            )
        for batch in self._strided if window is None else ():
            batch.attend(query_THE, keys, values, output_THE, scaling=scaling)
        for span in self._spans:
            if not span.is_single or (window is not None and not self._decoding):
                new = slice(span.offset, span.offset + span.length)
                output_THE[new] = self._attend_span(
                    span, layer, query_THE[new], key_TKE[new], value_TKE[new], scaling, window
                )
        return output_THE

    def _attend_span(
        self,
        span: Span,
        layer: int,
        query_THE: torch.Tensor,
        key_TKE: torch.Tensor,
        value_TKE: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Return the attention of several tokens of one sequence, [T, H, E]."""
        if span.past == 0 and window is None and not cpu_attention.can_attend_prompt(query_THE):
            key, value = key_TKE.transpose(0, 1), value_TKE.transpose(0, 1)
            return _attend_span(query_THE, key, value, scaling, None)
        first = max(0, span.past + 1 - window) if window else 0
        seen = slice(first, span.past + span.length)
        key = self._cache.view(self._cache.keys[layer], span.kv_slice)[:, seen]
        value = self._cache.view(self._cache.values[layer], span.kv_slice)[:, seen]
        if cpu_attention.can_attend_prompt(query_THE):
            return cpu_attention.attend_prompt(
                query_THE, key, value, scaling=scaling, window=window
            )
        mask_TS = self._find_mask(span, first, window, query_THE)
        return _attend_span(query_THE, key, value, scaling, mask_TS)

    def _find_mask(
        self, span: Span, first: int, window: int | None, like: torch.Tensor
    ) -> torch.Tensor:
        """Return the mask of a span's tokens over the keys from `first` on; all layers share it.

        Returns:
            [T, S], 0 where a token may attend, else minus infinity
        """
        mask_TS = self._masks.get((span.offset, window))
        if mask_TS is None:
            size = span.past + span.length - first
            is_seen_TS = _mask(span.length, size, window, like.device)
            mask_TS = torch.zeros(is_seen_TS.shape, dtype=like.dtype, device=like.device)
            mask_TS.masked_fill_(~is_seen_TS, float("-inf"))
            self._masks[span.offset, window] = mask_TS
        return mask_TS


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    metadata: StepMetadata,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, H, T, E], [1, K, T, E] -> [1, T, H, E]."""
    output_THE = metadata.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=scaling,
        window=sliding_window,
    )
    return output_THE.to(query.dtype)[None], None


def _attend_span(
    query_THE: torch.Tensor,
    key_KSE: torch.Tensor,
    value_KSE: torch.Tensor,
    scaling: float,
    mask_TS: torch.Tensor | None,
) -> torch.Tensor:
    """Return [T, H, E] for tokens of one sequence; without a mask they are its first tokens."""
    query_HTE = query_THE.transpose(0, 1)
    num_groups = query_HTE.shape[0] // key_KSE.shape[0]
    key_HSE, value_HSE = key_KSE.to(query_HTE.dtype), value_KSE.to(query_HTE.dtype)
    if num_groups > 1:
        key_HSE = key_HSE.repeat_interleave(num_groups, dim=0)
        value_HSE = value_HSE.repeat_interleave(num_groups, dim=0)
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
    """Return [T, S], True where each of the last `length` of `size` tokens may attend."""
    mask_TS = torch.ones(length, size, dtype=torch.bool, device=device)
    mask_TS = mask_TS.tril(size - length)
    return mask_TS.triu(size - length - window + 1) if window else mask_TS
