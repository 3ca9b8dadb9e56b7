"""The scheduler: decides what the next step computes, in plain Python without tensors or threads.

Each step goes through `plan` -> the runner -> `advance` -> `commit`. Requests join and leave
between any two steps. Several steps may be in flight at once:

- Concurrent steps have no sequence in common, so that none waits for another.
- A step may be planned once the previous one is launched and advanced, before its tokens are known.
  If an answer turns out to have ended, its memory is freed only when the steps that still compute
  it are committed.

Sequences are admitted in order of arrival, each as soon as the cache has a free slice for its
prompt plus `max_tokens`. So a running sequence is never preempted for lack of memory, and there is
no deadlock: every running sequence finishes, and the head of the queue gets its turn.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from typing import NamedTuple

from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVAllocator
from llava_ray.engine.torch_engine.scheduling.prefix_cache import KVCopy, PrefixCache
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.errors import EngineError
from llava_ray.types import Chunk

logger = logging.getLogger(__name__)

MIN_SEQUENCES_TO_SPLIT = 16
"""Fewest sequences for which two concurrent decoding steps pay off: each step reads all weights."""

GRANULE = 64
"""Slices of the cache are multiples of this many tokens."""


class ScheduledSequence(NamedTuple):
    """The tokens of one sequence that one step computes.

    Attributes:
        sequence: the sequence.
        start: position of the first token.
        num_tokens: number of tokens.
        is_complete: no token is pending afterwards, so that the step samples the next one.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    is_complete: bool

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> "ScheduledSequence":
        """Schedule the next `num_tokens` tokens of a sequence."""
        is_complete = num_tokens == sequence.num_pending
        return cls(sequence, sequence.num_computed, num_tokens, is_complete)


class StepPlan(NamedTuple):
    """One step: the sequences that the runner computes together, after it has made the copies."""

    scheduled: list[ScheduledSequence]
    copies: Many[KVCopy] = ()

    @property
    def complete(self) -> list[ScheduledSequence]:
        """The sequences for which the runner returns a token, in this order."""
        return [each for each in self.scheduled if each.is_complete]


class Scheduler:
    """Decides which sequences of an engine are computed in each step.

    Args:
        cache_tokens: size of the key-value cache.
        max_batch_size: sequences that run at once.
        prefill_tokens: prompt tokens of one step at most, over all sequences. A long prompt is
            computed in several steps, so that it does not stall the answers that are streaming.
        image_cost: cost of encoding one image token, in prompt tokens. Images are encoded in the
            step in which their prompt begins, and use at most half of that step's budget.
        prefix_cache: reuse keys and values of shared prefixes.
    """

    def __init__(
        self,
        *,
        cache_tokens: int,
        max_batch_size: int,
        prefill_tokens: int,
        image_cost: float = 0.0,
        prefix_cache: bool = True,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.kv_allocator = KVAllocator(cache_tokens, granule=GRANULE)
        self.prefix_cache = PrefixCache(self.kv_allocator, is_enabled=prefix_cache)
        self._max_batch_size = max_batch_size
        self._prefill_tokens = prefill_tokens
        self._image_cost = image_cost
        self._planned: set[Sequence] = set()  # in a step that is not advanced yet
        self._in_flight: Counter[Sequence] = Counter()  # number of uncommitted steps
        self._ended_in_flight: set[Sequence] = set()  # ended or aborted while in flight
        self._num_steps = 0

    def has_work(self) -> bool:
        """True while any sequence is unfinished."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the waiting queue."""
        assert 0 < sequence.num_reserved <= self.kv_allocator.num_tokens
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence and free its slice; does nothing if it has finished.

        A sequence that is being computed keeps its slice until that step is committed.
        """
        if sequence in self.running:
            self._end(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def can_split(self) -> bool:
        """Whether there is enough work for two concurrent steps to pay off."""
        self._admit()
        num_prompts = sum(sequence.num_pending > 1 for sequence in self.running)
        return len(self.running) >= MIN_SEQUENCES_TO_SPLIT or num_prompts > 1

    def plan(self, share: int = 1) -> StepPlan:
        """Return the next step: one token for each decoding sequence, and part of the prompts.

        Args:
            share: number of concurrent steps among which the work is divided.

        Returns:
            An empty plan if all work is in flight or depends on what is.
        """
        self._admit()
        if any(sequence.num_expected and sequence.has_own_logits for sequence in self.running):
            return StepPlan([])  # the logits processors depend on a token that is not known yet
        copies: list[KVCopy] = []
        chosen = [*self._plan_decode(share), *self._plan_prefill(share, copies)]
        self._planned.update(scheduled.sequence for scheduled in chosen)
        self._in_flight.update(scheduled.sequence for scheduled in chosen)
        return StepPlan(chosen, copies)

    def advance(self, plan: StepPlan) -> None:
        """Count a launched step as computed: later steps run after it on the device."""
        for scheduled in plan.scheduled:
            scheduled.sequence.num_computed += scheduled.num_tokens
            scheduled.sequence.num_expected += scheduled.is_complete
            self._planned.remove(scheduled.sequence)

    def commit(
        self, plan: StepPlan, tokens: list[int]
    ) -> list[tuple[Sequence, Chunk | EngineError]]:
        """Add the tokens of an advanced step: one for each complete sequence, in order.

        What goes wrong with one sequence ends that sequence.
        """
        self._num_steps += 1
        sequences = [scheduled.sequence for scheduled in plan.scheduled]
        for sequence in sequences:
            sequence.last_step = self._num_steps
        self._in_flight -= Counter(sequences)
        news: list[tuple[Sequence, Chunk | EngineError]] = []
        for scheduled, token in zip(plan.complete, tokens, strict=True):
            scheduled.sequence.num_expected -= 1
            if scheduled.sequence in self._ended_in_flight:
                continue
            item = _append(scheduled.sequence, token)
            if isinstance(item, EngineError) or item.finish_reason is not None:
                self._end(scheduled.sequence)
            news.append((scheduled.sequence, item))
        self._release_ended(sequences)
        return news

    def take_back(self, plan: StepPlan, reason: str) -> list[tuple[Sequence, EngineError]]:
        """Undo a planned step that the device had no memory for; it is not advanced.

        Its prompts end with an error, as they need most memory; if it has none, the sequence that
        was admitted last does, so that the next step is smaller. The others are planned again.
        """
        sequences = [scheduled.sequence for scheduled in plan.scheduled]
        self._planned.difference_update(sequences)
        self._in_flight -= Counter(sequences)
        alive = [each for each in self.running if each in set(sequences) - self._ended_in_flight]
        prompts = [each for each in alive if each.num_computed < len(each.prompt_ids)]
        news: list[tuple[Sequence, EngineError]] = []
        for sequence in prompts or alive[-1:]:
            sequence.num_computed = 0  # its keys and values are in doubt: nothing reuses them
            self._end(sequence)
            news.append((sequence, EngineError(reason)))
        self._release_ended(sequences)
        return news

    def _release_ended(self, sequences: Iterable[Sequence]) -> None:
        """Free what has ended and is no longer in flight."""
        for sequence in sequences:
            if sequence in self._ended_in_flight and sequence not in self._in_flight:
                self._ended_in_flight.remove(sequence)
                self._release(sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_batch_size:
            kv_slice = self.prefix_cache.reserve(self.waiting[0].num_reserved)
            if kv_slice is None:
                return
            sequence = self.waiting.popleft()
            sequence.kv_slice = kv_slice
            self.running.append(sequence)

    def _plan_decode(self, share: int) -> Iterator[ScheduledSequence]:
        """Yield decoding sequences in cache order: neighbours share one attention call."""
        streams = [sequence for sequence in self.running if sequence.num_pending == 1]
        free = [sequence for sequence in streams if self._is_free(sequence)]
        free.sort(key=lambda sequence: sequence.last_step)  # least recently computed first
        mine = free[: -(-len(streams) // share)]
        for sequence in sorted(mine, key=lambda sequence: sequence.kv_slice or (0, 0)):
            yield ScheduledSequence.of(sequence, 1)

    def _plan_prefill(self, share: int, copies: list[KVCopy]) -> Iterator[ScheduledSequence]:
        """Yield parts of prompts within the budget; append prefix copies to `copies`."""
        prompts = self._find_prompts(copies)
        budget = max(1, self._prefill_tokens // share)
        while budget and (sequence := next(prompts, None)):
            if sequence.inputs is not None and not sequence.num_computed:
                budget -= min(budget // 2, round(self._image_cost * sequence.num_image_tokens))
            num_tokens = min(sequence.num_pending, budget)
            budget -= num_tokens
            yield ScheduledSequence.of(sequence, num_tokens)

    def _find_prompts(self, copies: list[KVCopy]) -> Iterator[Sequence]:
        """Yield sequences whose prompts can be continued, in order of arrival."""
        for index, sequence in enumerate(self.running):
            if sequence.num_pending == 1 or not self._is_free(sequence):
                continue
            if not sequence.num_computed:
                donor, num_shared = self.prefix_cache.find(sequence, self.running[:index])
                if donor and _is_worth_waiting(sequence, donor, num_shared):
                    continue
                if donor and (num_ready := min(num_shared, donor.num_computed)):
                    copies.append(_copy(donor, sequence, num_ready))
            yield sequence

    def _is_free(self, sequence: Sequence) -> bool:
        """Whether a running sequence has work that no planned step does."""
        is_over = sequence in self._ended_in_flight or not sequence.may_continue
        return not (is_over or sequence in self._planned)

    def _end(self, sequence: Sequence) -> None:
        if sequence in self._in_flight:
            self._ended_in_flight.add(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        sequence.inputs = None
        self.running.remove(sequence)
        self.prefix_cache.keep(sequence)


def _is_worth_waiting(sequence: Sequence, donor: Sequence, num_shared: int) -> bool:
    """Whether another sequence is about to compute most of this one's prompt."""
    is_growing = donor.num_computed < num_shared and donor.num_pending > 1
    return is_growing and 2 * num_shared > len(sequence.prompt_ids)


def _copy(donor: Sequence, sequence: Sequence, num_tokens: int) -> KVCopy:
    assert donor.kv_slice is not None
    assert sequence.kv_slice is not None
    sequence.num_computed = sequence.num_cached = num_tokens
    return KVCopy(donor.kv_slice, sequence.kv_slice, num_tokens)


def _append(sequence: Sequence, token: int) -> Chunk | EngineError:
    try:
        if not sequence.failure:
            return sequence.append(token)
    except Exception as error:
        logger.exception("request %s failed", sequence.request_id)
        sequence.failure = f"{type(error).__name__}: {error}"
    return EngineError(f"this request failed: {sequence.failure}; others go on")
