"""Who waits on a machine whose cores are all busy: Ray's housekeeping, not a step of a model.

Ray's processes wake up some two thousand times a second, each time for a moment, and Linux lets
who wakes up go first. A thread of the engine is cut off by that six hundred times a second, and
those that compute with it wait too. Processes of Linux's batch policy (`man 7 sched`) never cut
off others when they wake up; they get as much of a core as before. No privilege is needed.
"""

import os
from contextlib import suppress


def give_way() -> None:
    """Let this thread, and all threads and processes that it starts, cut off no thread."""
    _set_policy("SCHED_BATCH")


def take_precedence() -> None:
    """Let this thread, and those that it starts, be cut off by none that gives way."""
    _set_policy("SCHED_OTHER")


def _set_policy(name: str) -> None:
    if hasattr(os, name):  # Linux alone has them
        with suppress(PermissionError):  # some sandboxes refuse any
            os.sched_setscheduler(0, getattr(os, name), os.sched_param(0))
