"""Allocates slices of the key-value cache to sequences: plain integers, no tensors.

The cache has `num_tokens` slots in a row. A sequence owns one contiguous slice, so that attention
reads its keys and values in place, without gathering or copying them.
"""

from bisect import insort
from typing import NamedTuple


class KVSlice(NamedTuple):
    """A contiguous range of the cache's slots, one slot a token."""

    start: int
    length: int


class KVAllocator:
    """First-fit allocator of contiguous slices; adjacent free slices are merged.

    Args:
        num_tokens: size of the cache.
        granule: lengths are rounded up to a multiple of this, so that similar requests get equal
            slices at equal distances, which attention can compute in one call.
    """

    def __init__(self, num_tokens: int, *, granule: int = 1) -> None:
        num_tokens = -(-num_tokens // granule) * granule
        self.num_tokens = num_tokens
        self._granule = granule
        self.num_used = 0
        self._free = [KVSlice(0, num_tokens)]  # by start

    def reserve(self, length: int) -> KVSlice | None:
        """Return a free slice of at least this length; None if there is none."""
        length = -(-length // self._granule) * self._granule
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                rest = KVSlice(start + length, free - length)
                self._free[i : i + 1] = [rest] if rest.length else []
                self.num_used += length
                return KVSlice(start, length)
        return None

    def release(self, kv_slice: KVSlice) -> None:
        """Return a slice to the free list."""
        self.num_used -= kv_slice.length
        insort(self._free, kv_slice)
        joined: list[KVSlice] = []
        for start, length in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = KVSlice(joined[-1].start, joined[-1].length + length)
            else:
                joined.append(KVSlice(start, length))
        self._free = joined
