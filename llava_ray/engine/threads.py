"""Keeps torch's threads on a CPU to one team, the engine's own.

OpenMP, with which torch computes on CPUs, keeps a team of threads for every thread that has ever
computed, for as long as that thread lives. Once all teams together have more threads than there
are cores, none of them waits actively any more, and every small operation costs a sleep and a
waking up: decoding becomes a third slower. So in an engine's process one thread alone may have a
team: the model is loaded in a thread that ends, and the helper that encodes computes alone.

What is not torch's, `run_in_team` lets the same team compute: threads beside it would have to wait
until those of the team, which wait actively, have given up their cores.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

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


def run_in_team(work: Callable[[int], None], num_parts: int) -> None:
    """Call `work` with 0, 1, ... at once, in the threads with which torch computes for this one.

    Where torch computes without GCC's OpenMP, one after the other.

    Args:
        num_parts: at most the number of threads. Parts are parallel where they let go of the GIL.
    """
    openmp = _find_openmp() if num_parts > 1 else None
    if openmp is None:
        for index in range(num_parts):
            work(index)
        return
    errors: list[Exception] = []

    def call(_: Any) -> None:
        try:
            work(openmp.omp_get_thread_num())
        except Exception as error:  # noqa: BLE001  else it would be lost in the thread
            errors.append(error)

    openmp.GOMP_parallel(_Part(call), None, num_parts, 0)
    if errors:
        raise errors[0]


_Part = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _find_openmp() -> Any:
    """Return the OpenMP library that torch has loaded, by way of what depends on it."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        openmp = ctypes.CDLL(str(library))
        openmp.GOMP_parallel.argtypes = [_Part, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        openmp.GOMP_parallel.restype = None
        openmp.omp_get_thread_num.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return openmp
