"""Shared by the benchmarks: separate processes, Ray, memory, tables."""

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

MEMORY_PERIOD_S = 5.0
"""Seconds between two measurements of memory; each takes time from what is measured."""


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@dataclass
class Clock:
    """Times the steps of a process that takes turns with others.

    Attributes:
        mine, next: semaphores of this process and of the one whose turn is next.
        times_s: durations of the finished steps.
        begun_s: when the current step began.
    """

    mine: Any
    next: Any
    times_s: list[float] = field(default_factory=list)
    begun_s: float | None = None

    def tick(self) -> None:
        """End the current step, wait for this process's turn, and begin the next step."""
        if self.begun_s is not None:
            self.times_s.append(time.perf_counter() - self.begun_s)
            self.next.release()
        self.mine.acquire()
        self.begun_s = time.perf_counter()


def take_turns(functions: Sequence[Callable[..., None]], *args: Any) -> list[list[float]]:
    """Call functions in separate processes that take turns, one step at a time.

    All of them are thus affected alike by whatever else the machine does.

    Args:
        functions: each takes `args` and a `Clock`; all tick it equally often.
        args: arguments of all functions.

    Returns:
        For each function the durations of its steps, without the last.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(len(functions), context) as pool, context.Manager() as manager:
        turns = [manager.Semaphore(0) for _ in functions]
        clocks = [Clock(*pair) for pair in zip(turns, turns[1:] + turns[:1], strict=True)]
        pairs = zip(functions, clocks, strict=True)
        futures = [pool.submit(_call_timed, function, *args, clock) for function, clock in pairs]
        turns[0].release()
        wait(futures, return_when=FIRST_EXCEPTION)  # after an error no other waits for its turn
    return [future.result() for future in futures]


def _call_timed(function: Callable[..., None], *args: Any) -> list[float]:
    clock = args[-1]
    function(*args)
    clock.next.release()
    return clock.times_s


def start_ray(processes: int) -> None:
    """Start Ray on this machine with `processes` CPUs."""
    import ray

    ray.init(
        num_cpus=processes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def stop_ray() -> None:
    """Stop the Ray that was started here."""
    import ray

    ray.shutdown()


@contextmanager
def watch_memory() -> Iterator[list[float]]:
    """Yield a list whose only item becomes the peak memory of this process and its children."""
    import psutil

    peak, ended = [0.0], threading.Event()

    def measure() -> float:
        total = 0.0
        this = psutil.Process()
        for process in [this, *this.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                continue  # it ended meanwhile
        return total

    def watch() -> None:
        while not ended.wait(MEMORY_PERIOD_S):
            peak[0] = max(peak[0], measure())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak[0] = max(peak[0], measure())


def print_table(rows: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    names = list(asdict(rows[0]))
    for name in names:
        table.add_column(name, justify="left" if name == "system" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in asdict(row).values()))
    Console(width=140).print(table)
    print(json.dumps([asdict(row) for row in rows]))
