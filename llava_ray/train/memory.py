"""Memory of a worker that computes on CPUs."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Let this process keep what it frees: each step takes as much anew as the one before.

    Else glibc gives it back to the system in some processes and not in others, as the heap happens
    to lie, and there each page is a fault again in every step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
