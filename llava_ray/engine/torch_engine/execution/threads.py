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


def run_in_temporary_thread(work: Callable[[], T]) -> T:
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
    """Call `work` with 0, 1, ..., in the threads with which torch computes for this one.

    Parts are parallel where they let go of the GIL. Where torch computes without GCC's OpenMP, or
    has fewer threads than there are parts, one comes after the other.
    """
    parts = iter(range(num_parts))  # each thread takes the next
    errors: list[Exception] = []

    def call(_: Any) -> None:
        try:
            for part in parts:
                work(part)
        except Exception as error:  # noqa: BLE001 - else it would be lost in the thread
            errors.append(error)

    if num_parts > 1 and (run := _find_openmp()):
        run(_Call(call), None, num_parts, 0)
    else:
        call(None)
    if errors:
        raise errors[0]


_Call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _find_openmp() -> Callable[..., None] | None:
    """Return what runs a team in the OpenMP library that torch has loaded."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # which needs it
    try:
        run = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = [_Call, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run
