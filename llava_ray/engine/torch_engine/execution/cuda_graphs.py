"""CUDA graphs for decoding steps, in which every sequence computes one token.

While a batch decodes, a step is hundreds of small operations, and the GPU waits longer for Python
to launch them than it computes. Recorded once for each of a few batch sizes, they are one launch.
The numbers that differ from step to step are in one tensor at a fixed address, which one copy
fills.

Shapes: B sequences, T = B tokens, V vocabulary, H query heads, K kv heads, E head size.
"""

import bisect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_ray.engine.torch_engine.execution.attention_metadata import (
    DecodeMetadata,
    RotateAndAttend,
)
from llava_ray.engine.torch_engine.execution.device_transfer import send
from llava_ray.engine.torch_engine.execution.kv_cache import KVCache
from llava_ray.engine.torch_engine.execution.sampler import SampledTokens
from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVSlice
from llava_ray.engine.torch_engine.scheduling.scheduler import StepPlan

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_OUR_FRAMES = (str(Path(torch.__file__).parent), __file__)
"""Stack frames in these files do not show which part of a language model fails."""

_TRIES = 2
"""Steps run before one is recorded, because libraries initialise themselves in the first."""


def list_batch_sizes(max_batch_size: int) -> list[int]:
    """Return the batch sizes to record; a batch is padded to the next larger one.

    They are so close that a batch size in between needs no kernel that neither neighbour has
    compiled.
    """
    return [size for size in _SIZES if size < max_batch_size] + [max_batch_size]


class GraphStepMetadata:
    """Metadata of a step of B sequences with one token each, in tensors with fixed addresses.

    The language model gets it in place of `attention.StepMetadata`.

    Args:
        size: B.
        idle: a slice of the cache that belongs to no sequence, for the rows that pad a batch.
        max_batch_size: the largest batch of any step.
    """

    wanted: torch.Tensor | None = None  # the hidden states of all tokens are
    rotate_and_attend: RotateAndAttend | None = None  # only CPUs have such a kernel

    def __init__(self, size: int, cache: KVCache, idle: KVSlice, *, max_batch_size: int) -> None:
        self._cache, self._idle = cache, idle
        self._numbers_5B = torch.zeros(5, size, dtype=torch.int64, device=cache.device)
        self._latest_B = torch.zeros(max_batch_size, dtype=torch.int64, device=cache.device)
        self._tokens_B = torch.arange(size, device=cache.device)
        self._heads_K = torch.arange(cache.num_kv_heads, device=cache.device)
        self._known_B, self._rows_B, *rest = self._numbers_5B
        self.positions_T, self._starts_B, self._sizes_B = rest
        self.fill(StepPlan([]), None)

    def fill(self, plan: StepPlan, latest: SampledTokens | None) -> None:
        """Describe this step's tokens; ids that the host does not know yet come from `latest`."""
        columns = []
        for sequence, start, *_ in plan.scheduled:
            assert sequence.kv_slice is not None
            row = latest.rows[sequence] if latest and sequence.num_expected else -1
            known = sequence.ids_from(start, 1) if row < 0 else [0]
            columns.append((*known, row, start, *sequence.kv_slice))
        columns += [(0, -1, 0, *self._idle)] * (len(self._tokens_B) - len(columns))
        numbers_5B = send(torch.tensor(columns).T.contiguous(), self._numbers_5B.device)
        self._numbers_5B.copy_(numbers_5B)
        if latest:
            self._latest_B[: len(latest.tokens_B)] = latest.tokens_B

    def begin(self) -> None:
        """Compute what all layers share. This and what follows is recorded in the graph."""
        latest_B = self._latest_B[self._rows_B.clamp(min=0)]
        self.ids_B = torch.where(self._rows_B < 0, self._known_B, latest_B)
        self._decoding = DecodeMetadata(
            self._tokens_B,
            self._starts_B,
            self._sizes_B,
            self.positions_T + 1,
            num_kv_heads=self._cache.num_kv_heads,
        )
        firsts_B = self._starts_B * self._cache.num_kv_heads + self.positions_T
        self._rows = (firsts_B[:, None] + self._sizes_B[:, None] * self._heads_K).flatten()

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
        """Store keys and values, then attend; see `AttentionMetadata.attend`. [T, H, E]."""
        cache = self._cache
        assert cache.attend_decode is not None
        cache.store(layer, self._rows, key_TKE, value_TKE)
        output_THE = query_THE.new_empty(query_THE.shape)
        cache.attend_decode(
            query_THE,
            cache.keys[layer],
            cache.values[layer],
            self._decoding.find_rows(window),
            output_THE,
            num_kv_heads=cache.num_kv_heads,
            scaling=scaling,
        )
        return output_THE


class _StepWithoutAttention(GraphStepMetadata):
    """A step without attention, for tensors without memory, which Triton kernels cannot take."""

    def attend(
        self,
        layer: int,
        query_THE: torch.Tensor,
        key_TKE: torch.Tensor,
        value_TKE: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """Store keys and values; return a tensor of the output's shape."""
        self._cache.store(layer, self._rows, key_TKE, value_TKE)
        return query_THE.new_empty(query_THE.shape)


class _OneDevice(TorchDispatchMode):
    """Raises for operations that copy between the step's device and another one.

    A tensor without dimensions may be on the CPU, since a kernel gets it as a number.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._type = device.type

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if torch.is_tensor(each)]
        others = [each for each in tensors if each.device.type != self._type]
        is_copy = "copy" in str(operation)
        if len(others) < len(tensors) and any(each.dim() or is_copy for each in others):
            raise RuntimeError(f"{operation} needs a tensor of device {others[0].device}")
        return result


class DecodeGraphs:
    """Computes decoding steps by replaying the graph of the next larger recorded batch size.

    Until `record` is called it computes the same without graphs, which also works on a CPU.

    Args:
        compute: (token ids [B], metadata of their step) -> logits [B, V].
        idle: a slice of the cache that belongs to no sequence.
        max_batch_size: the largest batch of any step.
    """

    def __init__(
        self,
        compute: Callable[[torch.Tensor, GraphStepMetadata], torch.Tensor],
        cache: KVCache,
        idle: KVSlice,
        *,
        max_batch_size: int,
    ) -> None:
        self._compute = compute
        self._sizes = list_batch_sizes(max_batch_size)
        self._steps = [
            GraphStepMetadata(size, cache, idle, max_batch_size=max_batch_size)
            for size in self._sizes
        ]
        self._trial = _StepWithoutAttention(1, cache, idle, max_batch_size=max_batch_size)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @staticmethod
    def can_compute(plan: StepPlan) -> bool:
        """Whether each sequence of the plan computes one token, and none of them an image token."""
        return bool(plan.scheduled) and all(
            scheduled.num_tokens == 1 and scheduled.sequence.inputs is None
            for scheduled in plan.scheduled
        )

    def compute(self, plan: StepPlan, latest: SampledTokens | None) -> torch.Tensor:
        """Return the logits of a plan's tokens, [B, V]; the next call overwrites them.

        Args:
            latest: the tokens sampled last; they include those of the plan that the host does not
                know yet.
        """
        index = bisect.bisect_left(self._sizes, len(plan.scheduled))
        step = self._steps[index]
        step.fill(plan, latest)
        if index in self._graphs:
            graph, logits_BV = self._graphs[index]
            graph.replay()
        else:
            logits_BV = self._run(step)
        return logits_BV[: len(plan.scheduled)]

    def _run(self, step: GraphStepMetadata) -> torch.Tensor:
        step.begin()
        return self._compute(step.ids_B, step)

    @torch.inference_mode()
    def find_obstacle(self) -> str | None:
        """Return why a step cannot be recorded, or None if no reason is found.

        It runs the step on tensors without memory, where reading a number from the device fails
        just as it does while a graph is recorded. A failed recording, by contrast, never frees the
        memory of its pool.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        device = self._trial.positions_T.device
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), _OneDevice(device):
                self._run(self._trial)
        except Exception as error:  # noqa: BLE001 - whatever a language model does
            frames = traceback.extract_tb(error.__traceback__)
            *_, where = [each for each in frames if not each.filename.startswith(_OUR_FRAMES)]
            return f"{Path(where.filename).name}:{where.lineno} ({where.line}): {error}"
        return None

    @torch.inference_mode()
    def record(self) -> str | None:
        """Record all sizes, the largest first: the smaller ones reuse the memory of its pool.

        Returns:
            Why this language model or GPU cannot be recorded; None if it was.
        """
        if obstacle := self.find_obstacle():
            return obstacle
        try:
            with torch.cuda.device(self._steps[0].positions_T.device):
                pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
                for index in reversed(range(len(self._sizes))):
                    self._graphs[index] = self._record_one(self._steps[index], pool, stream)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return str(error)
        return None

    def _record_one(
        self, step: GraphStepMetadata, pool: Any, stream: torch.cuda.Stream
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Return a graph, and the tensor into which it writes the logits."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_TRIES):
                self._run(step)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits_BV = self._run(step)
        return graph, logits_BV
