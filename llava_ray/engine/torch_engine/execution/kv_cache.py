"""The key-value cache: one pool of keys and one of values for each layer.

Shapes: T tokens of a step, S slots of a KV slice, N slots of the cache, H query heads, K kv heads,
E head size.
"""

import contextlib
import importlib.util
import logging
import math
import mmap
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llava_ray.engine.torch_engine.execution import cpu_attention
from llava_ray.engine.torch_engine.execution.cpu_layers import store_rows
from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVSlice

logger = logging.getLogger(__name__)

_PREFAULTED_BYTES = 1 << 30
"""Bytes of the cache on a CPU that are pre-faulted; sequences get the lowest free slots first."""

_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, which Python's mmap does not name."""


class KVShape(NamedTuple):
    """What one token takes in the cache: layers, heads and their size."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    @classmethod
    def of(cls, text_config: Any) -> "KVShape":
        """Return that of a language model of transformers."""
        heads = text_config.num_attention_heads
        return cls(
            num_layers=text_config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(text_config, "num_key_value_heads", None) or heads,
            head_size=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
        )

    def count_token_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one token's keys and values, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * dtype.itemsize


class KVCache:
    """Keys and values of all sequences, for every layer.

    A layer's pool is [N * K, E]; a slice of S slots is stored in it as [K, S, E], so that the
    keys of one head of a sequence are contiguous. On a CPU it is bfloat16 or float32, the dtypes
    that `cpu_attention` reads.

    Attributes:
        attend_decode: attention of all sequences with one new token each in one call, wherever
            their keys are; see `cpu_attention.attend_decode`. None: not available here.
        attention: what computes it, or why not the kernels, for people.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        is_supported = device.type != "cpu" or dtype == torch.bfloat16
        self.dtype = dtype if is_supported else torch.float32
        self.device = device
        self.num_kv_heads = num_kv_heads
        shape = (num_tokens * num_kv_heads, head_size)
        ready = _PREFAULTED_BYTES // (2 * num_layers)
        self.keys = [_zeros(shape, self.dtype, device, ready) for _ in range(num_layers)]
        self.values = [_zeros(shape, self.dtype, device, ready) for _ in range(num_layers)]
        self.attend_decode, self.attention = _choose_attention(
            self.keys[0], num_heads, num_kv_heads
        )

    def store(
        self, layer: int, rows: torch.Tensor, key_TKE: torch.Tensor, value_TKE: torch.Tensor
    ) -> None:
        """Write one layer's keys and values of a step."""
        for pool, new_TKE in ((self.keys[layer], key_TKE), (self.values[layer], value_TKE)):
            if self.device.type == "cpu":
                store_rows(pool, rows, new_TKE)
            else:
                pool.index_copy_(0, rows, new_TKE.to(pool.dtype).flatten(0, 1))

    def copy(self, source: KVSlice, target: KVSlice, num_tokens: int) -> None:
        """Copy the first keys and values of one slice to the beginning of another."""
        for pool in (*self.keys, *self.values):
            new = self.view(pool, target)[:, :num_tokens]
            new.copy_(self.view(pool, source)[:, :num_tokens])

    def view(self, pool: torch.Tensor, kv_slice: KVSlice) -> torch.Tensor:
        """Return a view of one slice of a pool, [K, S, E]."""
        heads = self.num_kv_heads
        begin, end = kv_slice.start * heads, (kv_slice.start + kv_slice.length) * heads
        return pool[begin:end].view(heads, kv_slice.length, -1)


def _choose_attention(
    pool: torch.Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Callable[..., None] | None, str]:
    if pool.device.type == "cpu":
        return cpu_attention.attend_decode, "own kernels"
    if pool.device.type != "cuda" or not importlib.util.find_spec("triton"):
        return None, "torch (Triton is not installed)"
    from llava_ray.engine.torch_engine.execution import triton_attention

    fault = triton_attention.find_fault(
        pool, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=pool.shape[1]
    )
    if fault is None:
        return triton_attention.attend_decode, "Triton"
    logger.warning("attention is computed by torch, without CUDA graphs: %s", fault)
    return None, f"torch ({fault})"


def _zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, ready: int
) -> torch.Tensor:
    """Return zeros; on a CPU in huge pages, which cause fewer TLB misses.

    Pages are faulted in on first write, except the first `ready` bytes, which Linux pre-faults:
    otherwise, page faults take a tenth of the time of a prompt.
    """
    if device.type == "cpu":
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        size = math.prod(shape) * dtype.itemsize
        pages = mmap.mmap(-1, size, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
            with contextlib.suppress(OSError):  # before Linux 5.14
                pages.madvise(_POPULATE_WRITE, 0, min(ready, size))
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
