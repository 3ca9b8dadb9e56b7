"""Prefix caching: reuses the keys and values of a prefix that two prompts share.

Finished sequences stay in the cache until their slots are needed; the least recently used is
evicted first. A new sequence that shares a prefix with one of them, or with a running one, gets a
copy of those keys and values instead of computing them: the next turn of a conversation, another
question about an image, a system prompt. Plain Python; the model runner makes the copies.
"""

from collections.abc import Iterable
from typing import NamedTuple

from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVAllocator, KVSlice
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence

MIN_SHARED = 16
"""Shortest shared prefix, in tokens, that is worth a copy."""

_BLOCK = 64  # tokens compared at once


class KVCopy(NamedTuple):
    """A copy of the first `num_tokens` keys and values of one slice to another."""

    source: KVSlice
    target: KVSlice
    num_tokens: int


class PrefixCache:
    """Finished sequences whose keys and values are still in the cache.

    Args:
        allocator: of the cache; kept slices are released to it when it runs out.
        is_enabled: False: nothing is kept and nothing is found.
    """

    def __init__(self, allocator: KVAllocator, *, is_enabled: bool = True) -> None:
        self._allocator, self._is_enabled = allocator, is_enabled
        self._kept: list[Sequence] = []  # the latest use last

    @property
    def num_tokens(self) -> int:
        """KernelInputs of the cache that could be had at once."""
        slices = [sequence.kv_slice for sequence in self._kept]  # asked for by another thread, too
        return sum(kv_slice.length for kv_slice in slices if kv_slice)

    def reserve(self, length: int) -> KVSlice | None:
        """Return a free slice, evicting kept sequences if necessary; None if there is none."""
        while (kv_slice := self._allocator.reserve(length)) is None and self._kept:
            self._forget(self._kept[0])
        return kv_slice

    def keep(self, sequence: Sequence) -> None:
        """Take over a finished sequence and its slice."""
        if not self._is_enabled:
            self._release(sequence)
            return
        del sequence.content[sequence.num_computed :]
        for other in list(self._kept):
            if count_shared(other.content, sequence.content) == len(other.content):
                self._forget(other)  # an earlier turn of the same conversation
        self._kept.append(sequence)

    def find(self, sequence: Sequence, running: Iterable[Sequence]) -> tuple[Sequence | None, int]:
        """Return the sequence with the longest shared prefix, and its length in tokens.

        The last token of a prompt is never shared: its logits are needed. A running sequence may
        not have computed all of the shared prefix yet.
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
    """Return the length of the longest common prefix."""
    length = min(len(first), len(second))
    start = 0
    while start < length and first[start : start + _BLOCK] == second[start : start + _BLOCK]:
        start += _BLOCK
    while start < length and first[start] == second[start]:
        start += 1
    return min(start, length)
