"""What the cache holds already: beginnings that one prompt shares with another.

Sequences that have ended stay in the cache until their place is needed, the longest unused first.
A new one that begins like one of them, or like one that runs, gets a copy of those keys and values
in place of computing them: the next turn of a conversation, another question about an image,
a system prompt. Plain Python; the runner does the copying.
"""

from collections.abc import Iterable
from typing import NamedTuple

from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVAllocator, KVSlice
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence

MIN_SHARED = 16
"""Tokens below which nothing is copied."""

_BLOCK = 64  # tokens compared at once


class KVCopy(NamedTuple):
    """Keys and values of the first `num_tokens` of one region, wanted in another."""

    source: KVSlice
    target: KVSlice
    num_tokens: int


class PrefixCache:
    """The sequences that ended, and where they still are.

    Args:
        regions: of the cache; what is kept here is given back to them when they run short.
        is_enabled: without it nothing is kept and nothing found.
    """

    def __init__(self, allocator: KVAllocator, *, is_enabled: bool = True) -> None:
        self._allocator, self._is_enabled = allocator, is_enabled
        self._kept: list[Sequence] = []  # the latest use last

    @property
    def num_tokens(self) -> int:
        """KernelInputs of the cache that could be had at once."""
        regions = [sequence.kv_slice for sequence in self._kept]  # asked for by another thread, too
        return sum(region.length for region in regions if region)

    def reserve(self, length: int) -> KVSlice | None:
        """Return a free region, for which as many sequences are forgotten as it takes."""
        while (region := self._allocator.reserve(length)) is None and self._kept:
            self._forget(self._kept[0])
        return region

    def keep(self, sequence: Sequence) -> None:
        """Take over a sequence that has ended, with its region."""
        if not self._is_enabled:
            self._release(sequence)
            return
        del sequence.content[sequence.num_computed :]
        for other in list(self._kept):
            if count_shared(other.content, sequence.content) == len(other.content):
                self._forget(other)  # an earlier turn of the same conversation
        self._kept.append(sequence)

    def find(self, sequence: Sequence, running: Iterable[Sequence]) -> tuple[Sequence | None, int]:
        """Return who shares the longest beginning with a sequence, and how many tokens.

        The last token of a prompt is never shared: from it the next one follows. Some of what a
        running sequence shares may not be computed yet.
        """
        wanted = sequence.content[: len(sequence.prompt_ids) - 1]
        best, most = None, 0
        for other in (*running, *self._kept) if self._is_enabled else ():
            shared = count_shared(other.content, wanted)
            if shared >= max(MIN_SHARED, most + 1):
                best, most = other, shared
        if best in self._kept:
            self._kept.remove(best)
            self._kept.append(best)
        return best, most

    def _forget(self, sequence: Sequence) -> None:
        self._kept.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.kv_slice is not None
        self._allocator.release(sequence.kv_slice)
        sequence.kv_slice = None


def count_shared(first: list[int], second: list[int]) -> int:
    """Return the length of the longest common beginning."""
    length = min(len(first), len(second))
    start = 0
    while start < length and first[start : start + _BLOCK] == second[start : start + _BLOCK]:
        start += _BLOCK
    while start < length and first[start] == second[start]:
        start += 1
    return min(start, length)
