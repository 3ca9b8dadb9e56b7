"""Keeps torch's threads on a CPU to one OpenMP team, the engine's own.

torch computes on CPUs with OpenMP, which keeps a team of threads for every thread that has ever
computed, for as long as that thread lives. Once all teams together have more threads than there
are cores, OpenMP's threads stop busy-waiting, and every small operation pays for a sleep and a
wake-up: decoding becomes a third slower. So in an engine's process only one thread has a team: the
model is loaded in a temporary thread, and the thread that encodes images computes without a team.

`run_in_team` runs other code on that same team. Additional threads would have to wait until the
busy-waiting threads of the team give up their cores.
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
    """Return what `work` returns; the thread that it runs in ends, and its OpenMP team with it."""
    with ThreadPoolExecutor(1, thread_name_prefix="temporary") as executor:
        return executor.submit(work).result()


def start_single_threaded_executor(name: str) -> ThreadPoolExecutor:
    """Return an executor with one running thread whose torch operations are single-threaded.

    Call this before `use_threads`: part of torch's setting is global, and the last call wins.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    executor.submit(use_threads, 1).result()
    return executor


def use_threads(number: int) -> None:
    """Let torch compute with `number` threads when this thread calls it.

    The thread also gets precedence over Ray's processes; see `llava_ray.priority`.
    """
    take_precedence()
    torch.get_num_threads()  # the first call copies the global number into this thread
    torch.set_num_threads(number)


def run_in_team(work: Callable[[int], None], num_parts: int) -> None:
    """Call `work` with 0 to `num_parts` - 1, in the OpenMP team that torch uses for this thread.

    Parts run in parallel as far as they release the GIL. Without GCC's OpenMP they run one after
    the other; with fewer threads than parts, each thread takes several.
    """
    parts = iter(range(num_parts))  # each thread takes the next
    errors: list[Exception] = []

    def call(_: Any) -> None:
        try:
            for part in parts:
                work(part)
        except Exception as error:  # noqa: BLE001 - raised again below; C code cannot pass it on
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
    """Return GOMP_parallel of the OpenMP library that torch has loaded; None: another library."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # depends on it
    try:
        run = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = [_Call, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run
