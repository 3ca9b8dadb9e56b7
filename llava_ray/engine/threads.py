"""Keeps torch's threads on a CPU to one team, the engine's own.

OpenMP, with which torch computes on CPUs, keeps a team of threads for every thread that has ever
computed, for as long as that thread lives. Once all teams together have more threads than there
are cores, none of them waits actively any more, and every small operation costs a sleep and a
waking up: decoding becomes a third slower. So in an engine's process one thread alone may have a
team: the model is loaded in a thread that ends, and the helper that encodes computes alone.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from llava_ray.priority import take_precedence

T = TypeVar("T")


def run_in_passing_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns; the thread that it ran in is gone, and its team with it."""
    with ThreadPoolExecutor(1, thread_name_prefix="passing") as executor:
        return executor.submit(work).result()


def start_single_threaded_executor(name: str) -> ThreadPoolExecutor:
    """Return an executor with one thread, already running, whose torch operations get no team.

    Call it before `use_threads`: part of torch's setting is global, and the last one counts.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    executor.submit(use_threads, 1).result()
    return executor


def use_threads(number: int) -> None:
    """Let torch compute with this many threads when it is called from this one, before Ray's."""
    take_precedence()
    torch.get_num_threads()  # a thread takes over the global number at its first question
    torch.set_num_threads(number)
