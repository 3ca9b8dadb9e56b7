"""The actor at the heart of the torch engine: one thread that alone touches scheduler and runner.

The world speaks to it through its inbox, which it reads between two steps; it answers by handing
chunks to the event loops of those who read. On two cores, large steps are computed side by side in
two more threads: each tells the inbox that it is done, and gets its next step at once, without
waiting for the other. (Threads that share every operation of a step wait for each other some
hundred times in it: when other processes use the same cores, a moment that one thread does not run
is lost to both.) A GPU is given its next step while it computes the one before, so that it never
waits for Python. An exception in a step means that the engine is broken: all streams fail with an
`EngineError`, and so does everything that is asked later.
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

from llava_ray.engine.torch_engine.execution.model_runner import LaunchedStep, StepRunner
from llava_ray.engine.torch_engine.scheduling.scheduler import Scheduler, StepPlan
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.errors import EngineError
from llava_ray.types import Chunk

logger = logging.getLogger(__name__)


class OutputQueue:
    """Where the chunks of one sequence arrive, in the event loop that made it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Chunk | EngineError] = asyncio.Queue()


class Add(NamedTuple):
    """Message: compute this sequence."""

    sequence: Sequence
    output: OutputQueue


class Abort(NamedTuple):
    """Message: forget this sequence."""

    sequence: Sequence


class Ping(NamedTuple):
    """Message: show that you work."""

    answer: Future[None]


class Done(NamedTuple):
    """Message, of a thread: this step is computed, or failed."""

    plan: StepPlan
    tokens: Future[list[int]]
    thread: ThreadPoolExecutor


class Close(NamedTuple):
    """Message: end."""


@dataclass
class EngineCounters:
    """Counters since the start."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0


class EngineLoop:
    """Runs steps in a thread of its own while there is work, and sleeps while there is none.

    Args:
        threads: for steps side by side; none: there are no such.
        runs_ahead: launch a step before the tokens of the one before are read; see `Scheduler`.
        on_start: called first thing in that thread.
        name: of that thread.
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
        self._is_blocked = False  # all that there is to do waits for a step in flight
        self._pings: list[tuple[Ping, set[ThreadPoolExecutor]]] = []
        self._lock = threading.Lock()  # guards `_failure` against messages that come too late
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
        """Start steps side by side, or compute one with all threads once none is in flight."""
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
            else:  # what else there is waits for this one
                self._finish(plans[0], self._runner.run(plans[0]))
        elif num_busy:
            self._is_blocked = True
        else:
            plan = self._plan()
            self._finish(plan, self._runner.run(plan))

    def _plan(self, share: int = 1) -> StepPlan:
        plan = self.scheduler.plan(share)
        self.counters.num_cached_tokens += sum(copy.num_tokens for copy in plan.copies)
        return plan

    def _compute_ahead(self) -> None:
        """Launch a step, if there is one already; then take the tokens of the one before."""
        plan = self._plan()
        if plan.scheduled:
            self._launched.append((plan, self._runner.launch(plan)))
            self.scheduler.advance(plan)
        if len(self._launched) > bool(plan.scheduled):
            before, launched = self._launched.popleft()
            self._take_tokens(before, launched.read())

    def _plan_side_by_side(self) -> list[StepPlan]:
        """Return a step for each idle thread, or for fewer, if there is no more to compute.

        Copies are made here, before the next plan lets their sources go.
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
        """Read the inbox; wait for a message if there is nothing to compute."""
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
                self._finish(plan, tokens.result())
                for _, busy in self._pings:
                    busy.discard(thread)
                self._answer_pings()

    def _answer_pings(self) -> None:
        """Answer those that came before no step that is still in flight: it might be stuck."""
        for each in [each for each in self._pings if not each[1]]:
            self._pings.remove(each)
            answer = each[0].answer
            if answer.set_running_or_notify_cancel():  # else nobody waits any more
                self._answer(answer)

    def _answer(self, ping: Future[None]) -> None:
        try:
            self._runner.check()
        except Exception as error:
            ping.set_exception(EngineError(f"the engine's check failed: {error}"))
            raise
        ping.set_result(None)

    def _deliver(self, news: Iterable[tuple[Sequence, Chunk | EngineError]]) -> None:
        """Hand a step's chunks over: one call for each event loop that is waiting for some."""
        parcels: dict[asyncio.AbstractEventLoop, list[tuple[OutputQueue, Chunk | EngineError]]] = {}
        for sequence, item in news:
            output = self._outputs[sequence]
            if not isinstance(item, Chunk) or item.finish_reason is not None:
                del self._outputs[sequence]
            parcels.setdefault(output.loop, []).append((output, item))
        for loop, parcel in parcels.items():
            try:
                loop.call_soon_threadsafe(_hand_over, parcel)
            except RuntimeError:  # that event loop is closed: nobody reads any more
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
