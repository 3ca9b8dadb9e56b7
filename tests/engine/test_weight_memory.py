"""Memory of a GPU while weights are loaded and joined; torch's allocator is simulated.

Rules of torch's CUDACachingAllocator for blocks above 1 MiB: a segment is taken for what no free
block can hold; the smallest free block that holds a request is split; neighbours that are free are
merged. A classic segment is given back only when it is free as a whole, an expandable one by pages
of 2 MiB.
"""

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from llava_ray.engine.torch_engine.execution import fused_decoder

MB, GB = 1 << 20, 10**9
SEVEN_B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32064,
)


@dataclass
class Segment:
    size: int
    used: dict[int, int] = field(default_factory=dict)  # begin -> size

    def list_free(self) -> Iterator[tuple[int, int]]:
        begin = 0
        for start, size in [*sorted(self.used.items()), (self.size, 0)]:
            if start > begin:
                yield start - begin, begin
            begin = start + size


class Allocator:
    """A GPU's memory as torch takes it; blocks are (segment, begin)."""

    def __init__(self, *, is_expandable: bool) -> None:
        self._is_expandable = is_expandable
        self._segments: list[Segment] = [Segment(0)] if is_expandable else []

    def take(self, size: int) -> tuple[Segment, int]:
        size = -(-size // 512) * 512
        free = [
            (room, i, begin)
            for i, segment in enumerate(self._segments)
            for room, begin in segment.list_free()
            if room >= size
        ]
        if free:
            _, index, begin = min(free)
            segment = self._segments[index]
        elif self._is_expandable:
            segment = self._segments[0]
            begin = max((start + n for start, n in segment.used.items()), default=0)
            segment.size = begin + size
        else:
            segment, begin = (
                Segment(20 * MB if size < 10 * MB else -(-size // (2 * MB)) * 2 * MB),
                0,
            )
            self._segments.append(segment)
        segment.used[begin] = size
        return segment, begin

    def give_back(self, block: tuple[Segment, int]) -> None:
        segment, begin = block
        del segment.used[begin]

    def empty_cache(self) -> int:
        """Return the bytes that are still the process's."""
        if not self._is_expandable:
            self._segments = [each for each in self._segments if each.used]
            return sum(each.size for each in self._segments)
        page = 2 * MB
        pages = {
            number
            for start, size in self._segments[0].used.items()
            for number in range(start // page, -(-(start + size) // page))
        }
        return len(pages) * page


def load_and_fuse(monkeypatch, allocator: Allocator) -> tuple[int, int]:
    """Return the bytes of a 7B model's weights, and those that its process has at the end."""
    with torch.device("meta"):
        model = LlamaModel(SEVEN_B).bfloat16()

    def follow(parameter: nn.Parameter) -> int:
        block = allocator.take(parameter.nbytes)
        weakref.finalize(parameter, allocator.give_back, block)
        return parameter.nbytes

    allocator.give_back(allocator.take(sum(each.nbytes for each in model.parameters())))
    num_bytes = sum(follow(each) for _, each in sorted(model.named_parameters()))
    join = fused_decoder._join

    def join_followed(linears, interleaved):
        joined = join(linears, interleaved)
        sizes = [each.weight.nbytes for each, n in zip(linears, interleaved, strict=True) if n]
        copies = [allocator.take(size) for size in sizes]
        follow(joined.weight)
        for copy in copies:
            allocator.give_back(copy)
        return joined

    monkeypatch.setattr(fused_decoder, "_join", join_followed)
    fused_decoder.fuse(model)
    return num_bytes, allocator.empty_cache()


def test_joined_weights_leave_no_holes_in_expandable_segments(monkeypatch):
    weights, taken = load_and_fuse(monkeypatch, Allocator(is_expandable=True))
    assert weights > 13 * GB
    assert taken < weights + 0.3 * GB
    cache = 0.9 * 23.6 * GB - taken - 1.5 * GB  # an L4; the largest step and the image cache
    assert cache > 6 * GB


def test_classic_segments_would_keep_gigabytes_of_them(monkeypatch):
    weights, taken = load_and_fuse(monkeypatch, Allocator(is_expandable=False))
    assert taken > weights + 2 * GB


LOAD_AND_LOOK = """
import os, sys

class Look:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ["PYTORCH_ALLOC_CONF"], flush=True)
            os._exit(0)

sys.meta_path.insert(0, Look())
from llava_ray.config import ModelConfig
from llava_ray.engine.factory import load_engine

load_engine(ModelConfig(path="/nowhere"))
"""


@pytest.mark.parametrize("own", ["", "expandable_segments:False"])
def test_a_replica_asks_for_expandable_segments_before_torch_is_there(own):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_")}
    environment |= {"PYTORCH_ALLOC_CONF": own} if own else {}
    command = [sys.executable, "-W", "ignore", "-c", LOAD_AND_LOOK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [own or "expandable_segments:True"]
