"""Attention over the cache: one step of all sequences as one row of tokens.

The runner drives transformers' language model with the tokens of all sequences of a step side by
side ([1, T]); everything in the model but attention treats tokens one by one, and attention comes
here, through transformers' `AttentionInterface`. Keys and values go to the sequence's region of
the cache and are read in place.

Shapes: B sequences, T tokens of the step, S tokens that a sequence attends to, N places in the
cache, H query heads, K kv heads, G = H/K query heads for each kv head, E head size.
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
"""Under this name the attention below is known to transformers."""


class Span(NamedTuple):
    """One sequence's part of a metadata.

    Attributes:
        offset: where its tokens begin in the row of the metadata.
        length: how many they are.
        kv_slice: its part of the cache.
        past: how many tokens of it the cache holds already.
        is_prompt: its tokens belong to a prompt. They are computed as such even if it is a single
            one, so that keys and values do not depend on how a step divides the prompt.
    """

    offset: int
    length: int
    kv_slice: KVSlice
    past: int
    is_prompt: bool = False

    @property
    def is_single(self) -> bool:
        """Whether this is one new token of an answer, or the last token of a prompt alone."""
        return self.length == 1 and not self.is_prompt


class StridedBatch:
    """Sequences with one new token each, whose slices have equal lengths and distances.

    So their keys are one strided view of the cache, and one call of attention serves them all.
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
        """Write their part of a layer's attention.

        Query heads that share a kv head are computed like tokens that see the same.
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
        place = self._heads * head_size  # elements of a pool for each place in the cache
        return pool.as_strided(
            (batch, self._heads, length, head_size),
            (self._distance * place, self._size * head_size, head_size, 1),
            self._start * place,
        )


def _find_rows(spans: list[Span], positions_T: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Return the rows of the pools that belong to the tokens of a step: [T * K]."""
    begins = [
        span.kv_slice.start * cache.num_kv_heads for span in spans for _ in range(span.length)
    ]
    sizes = [span.kv_slice.length for span in spans for _ in range(span.length)]
    begins_T, sizes_T = send([begins, sizes], cache.device)
    heads_K = torch.arange(cache.num_kv_heads, device=cache.device)
    return ((begins_T + positions_T)[:, None] + sizes_T[:, None] * heads_K).flatten()


def _describe(spans: list[Span], cache: KVCache) -> DecodeMetadata:
    """Return where sequences with one new token each have theirs.

    Each row of the table begins at a multiple of 16 bytes: Triton compiles a kernel again for
    pointers that do not, which would stall a step of every odd number of sequences.
    """
    numbers = [(span.offset, *span.kv_slice, span.past + 1) for span in spans]
    numbers += [(0, 0, 0, 0)] * (len(spans) % _NUMBERS_IN_16_BYTES)
    rows = send(torch.tensor(numbers).T.contiguous(), cache.device)[:, : len(spans)]
    return DecodeMetadata(*rows, num_kv_heads=cache.num_kv_heads)


def _index(offsets: list[int], device: torch.device) -> slice | torch.Tensor:
    """Return what picks these tokens of a step: where they are neighbours, a view and no copy."""
    if offsets == list(range(offsets[0], offsets[0] + len(offsets))):
        return slice(offsets[0], offsets[-1] + 1)
    return send(offsets, device)


def group_by_stride(spans: list[Span]) -> list[list[Span]]:
    """Group spans of one token so that a group's slices have equal lengths and distances.

    A group is computed up to its longest sequence: very unequal ones are kept apart.
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
    """Where the tokens of one step and their keys and values are; implements `AttentionMetadata`.

    The wanted tokens are the last ones of the sequences whose pending tokens end in this step.
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
        self._places: dict[int | None, cpu_attention.KernelInputs] = {}
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
        if window not in self._places:
            rows = self._all.find_rows(window)
            self._places[window] = cpu_attention.KernelInputs.of(rows, keys, num_kv_heads=heads)
        return cpu_attention.rotate_and_attend(
            heads_TX,
            rotations_T1C,
            keys,
            self._cache.values[layer],
            self._places[window],
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
        """Store the step's keys and values, let each token attend to its own sequence.

        Args:
            window: each token sees this many tokens up to itself (sliding window); None: all.
            is_last: of all layers; only the wanted tokens attend, whose queries are given.

        Returns:
            [T, H, E], or [W, H, E]
        """
        self._cache.store(layer, self._rows, key_TKE, value_TKE)
        spans = self._last if is_last else self._all
        return spans.attend(layer, query_THE, key_TKE, value_TKE, scaling=scaling, window=window)


class _SpanAttention:
    """Attention of the spans of a step, or of other ones with queries of their own."""

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
        """Return what single tokens see of the cache, of which there are some."""
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
        """Return [T, H, E]; the step's keys and values are in the cache already."""
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
        """Return several tokens of one sequence, [T, H, E]."""
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
        """Return what a span's tokens may see from the `first` one on, made once for all layers.

        Returns:
            [T, S], 0 or minus infinity
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
    """Several tokens of one sequence; without a mask its first, causal among themselves."""
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
    """[T, S], True where the last `length` of `size` tokens may look."""
    mask_TS = torch.ones(length, size, dtype=torch.bool, device=device)
    mask_TS = mask_TS.tril(size - length)
    return mask_TS.triu(size - length - window + 1) if window else mask_TS
