"""Who owns which tokens of the key-value cache: plain numbers, no tensors.

The cache is one row of `num_tokens` places. A sequence owns one contiguous region of it, so that
attention reads a sequence's keys and values in place, without gathering or copying them.
"""

from bisect import insort


class Regions:
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
        self._free: list[tuple[int, int]] = [(0, num_tokens)]  # (start, length), by start
        self._owned: dict[int, int] = {}  # start -> length

    def reserve(self, length: int) -> int | None:
        """Return the start of a free range of at least that length, or None if there is none."""
        length = -(-length // self._granule) * self._granule
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                if free > length:
                    self._free[i] = (start + length, free - length)
                else:
                    del self._free[i]
                self._owned[start] = length
                self.num_used += length
                return start
        return None

    def release(self, start: int) -> None:
        """Take back the range that starts there."""
        length = self._owned.pop(start)
        self.num_used -= length
        insort(self._free, (start, length))
        joined: list[tuple[int, int]] = []
        for begin, size in self._free:
            if joined and joined[-1][0] + joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((begin, size))
        self._free = joined
