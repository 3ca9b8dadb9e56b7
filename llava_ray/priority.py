"""Who waits on a machine whose cores are all busy: Ray's housekeeping, not a step of a model.

Ray's processes wake up some two thousand times a second, each time for a moment, and Linux lets
who wakes up go first. A thread of the engine is cut off by that six hundred times a second, and
those that compute with it wait too. Processes of Linux's batch policy (`man 7 sched`) never cut
off others when they wake up; they get as much of a core as before. No privilege is needed.

Serve's controller compares what is with what should be, and its handles hand on their counters,
ten times a second each. Three times and once, as here, serve as well, as Ray itself gathers
counters every ten seconds, and leave 1 to 2 % of two cores to others.
"""

import os
from contextlib import suppress

_PACE = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
}
"""Read by the processes that Ray starts for Serve; what the user has set stays."""


def give_way() -> None:
    """Let this thread, and all threads and processes that it starts, cut off no thread."""
    _set_policy("SCHED_BATCH")


def slow_down_serve() -> None:
    """Let a Ray that this process starts look after Serve less often."""
    for name, value in _PACE.items():
        os.environ.setdefault(name, value)


def take_precedence() -> None:
    """Let this thread, and those that it starts, be cut off by none that gives way."""
    _set_policy("SCHED_OTHER")


def _set_policy(name: str) -> None:
    if hasattr(os, name):  # Linux alone has them
        with suppress(PermissionError):  # some sandboxes refuse any
            os.sched_setscheduler(0, getattr(os, name), os.sched_param(0))
