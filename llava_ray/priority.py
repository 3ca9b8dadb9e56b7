"""Scheduling priority on a machine with busy cores: Ray's housekeeping yields to the model.

Ray's processes wake up about two thousand times a second, each time for a moment, and Linux lets a
process that wakes up preempt one that runs. An engine thread is preempted that way six hundred
times a second, and the threads that compute with it wait too. Processes with Linux's batch policy
(`man 7 sched`) never preempt others when they wake up, and get the same share of a core as before.
No privilege is needed.

Serve's controller reconciles its state, and its handles report their counters, ten times a second
each. Three times and once a second are enough, because Ray itself gathers counters only every ten
seconds, and free 1 to 2 % of two cores.
"""

import os
from contextlib import suppress

_PACE = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
}
"""Read by the processes that Ray starts for Serve; values that the user has set are kept."""


def give_way() -> None:
    """Keep this thread, and all threads and processes that it starts, from preempting others."""
    _set_policy("SCHED_BATCH")


def slow_down_serve() -> None:
    """Lower the rate of Serve's housekeeping in a Ray that this process starts."""
    for name, value in _PACE.items():
        os.environ.setdefault(name, value)


def take_precedence() -> None:
    """Keep threads that give way from preempting this thread and those that it starts."""
    _set_policy("SCHED_OTHER")


def _set_policy(name: str) -> None:
    if hasattr(os, name):  # Linux only
        with suppress(PermissionError):  # some sandboxes refuse every policy
            os.sched_setscheduler(0, getattr(os, name), os.sched_param(0))
