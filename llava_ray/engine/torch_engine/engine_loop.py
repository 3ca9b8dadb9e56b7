"""The loop of the torch engine: one thread, the only one that uses the scheduler.

Other threads send it messages through its inbox, which it reads between two steps; it delivers
chunks to the event loops that read the streams. It computes steps in one of three ways:

- One after the other, in this thread.
- Side by side, on two cores: two more threads compute a step each, report to the inbox when they
  are done, and get their next step at once. (Threads that share every operation of one step would
  wait for each other hundreds of times in it, and each pause of one would stop both.)
- Ahead, on a GPU: the next step is launched while the GPU computes the previous one, so that it
  never waits for Python.

A step that the device has no memory for fails the prompts in it, and the engine goes on; see
`Scheduler.take_back`. Any other exception in a step means that the engine is broken: all open
streams and all later requests fail with an `EngineError`.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from llava_ray.engine.torch_engine.execution.model_runner import (
    LaunchedStep,
    StepMemoryError,
    StepRunner,
)
from llava_ray.engine.torch_engine.scheduling.scheduler import Scheduler, StepPlan
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.errors import EngineError
from llava_ray.types import Chunk

logger = logging.getLogger(__name__)


class OutputQueue:
    """Receives the chunks of one sequence, in the event loop that created it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Chunk | EngineError] = asyncio.Queue()


class Add(NamedTuple):
    """Message: compute this sequence."""

    sequence: Sequence
    output: OutputQueue


class Abort(NamedTuple):
    """Message: stop computing this sequence; nobody reads it any more."""

    sequence: Sequence


class Ping(NamedTuple):
    """Message: run a health check and resolve `answer`."""

    answer: Future[None]


class Done(NamedTuple):
    """Message from a step thread: this step is computed, or has failed."""

    plan: StepPlan
    tokens: Future[list[int]]
    thread: ThreadPoolExecutor


class Close(NamedTuple):
    """Message: end the loop."""


@dataclass
class EngineCounters:
    """Totals since the engine started."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0


class EngineLoop:
    """Runs steps in a thread of its own while there is work, and sleeps otherwise.

    Args:
        runner: computes the steps.
        scheduler: plans the steps.
        threads: single-threaded executors that compute steps side by side; empty: the loop's own
            thread computes all steps.
        runs_ahead: launch each step before the tokens of the previous one are read.
        on_start: called in the loop's thread before anything else.
        name: name of that thread.
    """

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        *,
        threads: Iterable[ThreadPoolExecutor] = (),
        runs_ahead: bool = False,
        on_start: Callable[[], None] = lambda: None,
        name: str = "engine",
    ) -> None:
        self.scheduler = scheduler
        self.counters = EngineCounters()
        self._runner = runner
        self._on_start = on_start
        self._outputs: dict[Sequence, OutputQueue] = {}
        self._inbox: queue.SimpleQueue[Add | Abort | Ping | Close | Done] = queue.SimpleQueue()
        self._threads = list(threads)
        self._idle = list(self._threads)
        self._runs_ahead = runs_ahead
        self._launched: deque[tuple[StepPlan, LaunchedStep]] = deque()
        self._is_blocked = False  # all work depends on a step in flight
        self._pings: list[tuple[Ping, set[ThreadPoolExecutor]]] = []
        self._lock = threading.Lock()  # no message may enter the inbox after `_failure` is set
        self._failure: str | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def send(self, message: Add | Abort | Ping | Close) -> None:
        """Put a message into the inbox.

        Raises:
            EngineError: the loop has ended.
        """
        with self._lock:
            if self._failure is not None:
                raise EngineError(self._failure)
            self._inbox.put(message)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        failure = "the engine was closed"
        try:
            self._on_start()
            while not self._is_closing:
                self._listen()
                if self.scheduler.has_work():
                    self._compute()
        except Exception as error:
            running = [sequence.request_id for sequence in self.scheduler.running]
            logger.exception("the engine broke while it computed %s", running)
            failure = f"the engine broke: {type(error).__name__}: {error}"
        self._end(failure)

    def _compute(self) -> None:
        """Start steps side by side; or compute one in this thread if none is in flight."""
        if self._runs_ahead:
            self._compute_ahead()
            return
        num_busy = len(self._threads) - len(self._idle)
        if self._threads and self.scheduler.can_split():
            plans = self._plan_side_by_side()
            if num_busy or len(plans) > 1:
                for plan in plans:
                    self._start(plan, self._idle.pop())
                self._is_blocked = True
            else:  # all other work depends on this step
                self._run_plan(plans[0])
        elif num_busy:
            self._is_blocked = True
        else:
            self._run_plan(self._plan())

    def _plan(self, share: int = 1) -> StepPlan:
        plan = self.scheduler.plan(share)
        self.counters.num_cached_tokens += sum(copy.num_tokens for copy in plan.copies)
        return plan

    def _compute_ahead(self) -> None:
        """Launch the next step, if one can be planned; then read the previous step's tokens."""
        plan = self._plan()
        is_launched = bool(plan.scheduled) and self._launch(plan)
        if len(self._launched) > is_launched:
            before, launched = self._launched.popleft()
            self._take_tokens(before, launched.read())

    def _launch(self, plan: StepPlan) -> bool:
        """Launch a step; return False if the device has no memory for it."""
        try:
            launched = self._runner.launch(plan)
        except StepMemoryError as error:
            self._take_back(plan, error)
            return False
        self._launched.append((plan, launched))
        self.scheduler.advance(plan)
        return True

    def _run_plan(self, plan: StepPlan) -> None:
        try:
            tokens = self._runner.run(plan)
        except StepMemoryError as error:
            self._take_back(plan, error)
        else:
            self._finish(plan, tokens)

    def _take_back(self, plan: StepPlan, error: StepMemoryError) -> None:
        news = self.scheduler.take_back(plan, error.message)
        failed = [sequence.request_id for sequence, _ in news]
        logger.error("%s; failed: %s", error.message, ", ".join(failed) or "none")
        self._deliver(news)

    def _plan_side_by_side(self) -> list[StepPlan]:
        """Return one plan per idle thread, or fewer if there is not enough work.

        Prefix copies are made here, because the next plan may reuse the memory of their sources.
        """
        plans: list[StepPlan] = []
        while len(plans) < len(self._idle):
            plan = self._plan(share=len(self._threads))
            if not plan.scheduled:
                break
            if plan.copies:
                self._runner.run(StepPlan([], plan.copies))
            plans.append(StepPlan(plan.scheduled))
        return plans

    def _start(self, plan: StepPlan, thread: ThreadPoolExecutor) -> None:
        running = thread.submit(self._runner.run, plan)
        running.add_done_callback(lambda tokens: self._inbox.put(Done(plan, tokens, thread)))

    def _finish(self, plan: StepPlan, tokens: list[int]) -> None:
        self.scheduler.advance(plan)
        self._take_tokens(plan, tokens)

    def _take_tokens(self, plan: StepPlan, tokens: list[int]) -> None:
        news = self.scheduler.commit(plan, tokens)
        self.counters.num_steps += 1
        self.counters.num_prompt_tokens += sum(
            each.num_tokens for each in plan.scheduled if each.num_tokens > 1
        )
        self.counters.num_new_tokens += len(news)
        self._deliver(news)

    def _listen(self) -> None:
        """Process the inbox; wait for a message if there is nothing to compute."""
        if self._is_blocked or not self.scheduler.has_work():
            self._take(self._inbox.get())
        while not self._inbox.empty():
            self._take(self._inbox.get())
        self._is_blocked = False

    def _take(self, message: Add | Abort | Ping | Close | Done) -> None:
        match message:
            case Add(sequence, output):
                self._outputs[sequence] = output
                self.scheduler.add(sequence)
            case Abort(sequence):
                self._outputs.pop(sequence, None)
                self.scheduler.abort(sequence)
            case Ping():
                self._pings.append((message, set(self._threads) - set(self._idle)))
                self._answer_pings()
            case Close():
                self._is_closing = True
            case Done(plan, tokens, thread):
                self._idle.append(thread)
                if isinstance(error := tokens.exception(), StepMemoryError):
                    self._take_back(plan, error)
                else:
                    self._finish(plan, tokens.result())
                for _, busy in self._pings:
                    busy.discard(thread)
                self._answer_pings()

    def _answer_pings(self) -> None:
        """Answer the pings for which every step in flight at their arrival has finished.

        Until then one of those steps might be stuck.
        """
        for each in [each for each in self._pings if not each[1]]:
            self._pings.remove(each)
            answer = each[0].answer
            if answer.set_running_or_notify_cancel():  # False: nobody waits any more
                self._answer(answer)

    def _answer(self, ping: Future[None]) -> None:
        try:
            self._runner.check()
        except StepMemoryError as error:
            ping.set_exception(error)
            return
        except Exception as error:
            ping.set_exception(EngineError(f"the engine's check failed: {error}"))
            raise
        ping.set_result(None)

    def _deliver(self, news: Iterable[tuple[Sequence, Chunk | EngineError]]) -> None:
        """Deliver a step's chunks, with one call per event loop."""
        parcels: dict[asyncio.AbstractEventLoop, list[tuple[OutputQueue, Chunk | EngineError]]] = {}
        for sequence, item in news:
            output = self._outputs[sequence]
            if not isinstance(item, Chunk) or item.finish_reason is not None:
                del self._outputs[sequence]
            parcels.setdefault(output.loop, []).append((output, item))
        for loop, parcel in parcels.items():
            try:
                loop.call_soon_threadsafe(_hand_over, parcel)
            except RuntimeError:  # the event loop is closed: nobody reads its streams
                for sequence in [s for s, output in self._outputs.items() if output.loop is loop]:
                    self._take(Abort(sequence))

    def _end(self, failure: str) -> None:
        with self._lock:
            self._failure = failure
        while not self._inbox.empty():
            match self._inbox.get():
                case Add(sequence, output):
                    self._outputs[sequence] = output
                case Ping() as ping:
                    self._pings.append((ping, set()))
        for ping, _ in self._pings:
            if ping.answer.set_running_or_notify_cancel():
                ping.answer.set_exception(EngineError(failure))
        self._deliver([(sequence, EngineError(failure)) for sequence in list(self._outputs)])
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.abort(sequence)


def _hand_over(parcel: list[tuple[OutputQueue, Chunk | EngineError]]) -> None:
    for output, item in parcel:
        output.items.put_nowait(item)
