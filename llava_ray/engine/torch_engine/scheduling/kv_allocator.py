"""Who owns which tokens of the key-value cache: plain numbers, no tensors.

The cache is one row of `num_tokens` places. A sequence owns one contiguous region of it, so that
attention reads a sequence's keys and values in place, without gathering or copying them.
"""

from bisect import insort
from typing import NamedTuple


class KVSlice(NamedTuple):
    """A range of the cache's places."""

    start: int
    length: int


class KVAllocator:
    """Hands out contiguous ranges, the first that fits, and joins what comes back.

    Args:
        num_tokens: size of the cache.
        granule: ranges are a multiple of this long, so that similar requests get equal ones:
            then they lie at equal distances, and attention can serve many in one call.
    """

    def __init__(self, num_tokens: int, *, granule: int = 1) -> None:
        num_tokens = -(-num_tokens // granule) * granule
        self.num_tokens = num_tokens
        self._granule = granule
        self.num_used = 0
        self._free = [KVSlice(0, num_tokens)]  # by start

    def reserve(self, length: int) -> KVSlice | None:
        """Return a free range of at least that length, or None if there is none."""
        length = -(-length // self._granule) * self._granule
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                rest = KVSlice(start + length, free - length)
                self._free[i : i + 1] = [rest] if rest.length else []
                self.num_used += length
                return KVSlice(start, length)
        return None

    def release(self, region: KVSlice) -> None:
        """Take a range back."""
        self.num_used -= region.length
        insort(self._free, region)
        joined: list[KVSlice] = []
        for start, length in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = KVSlice(joined[-1].start, joined[-1].length + length)
            else:
                joined.append(KVSlice(start, length))
        self._free = joined
