"""Stop a run on Ctrl-C or SIGTERM such that a checkpoint of its last step is kept.

The command's process gets the signal and leaves a request in Ray's key-value store; the first
worker looks for it after each step, and the loop saves and ends. A second signal ends at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_put,
)

from llava_ray.train.log import print_line

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_S = 0.2


def run_stoppable(work: Callable[[], Result], run: str) -> Result:
    """Do the work of a run in a thread, and pass on the first signal as a request to stop.

    In a thread, because Ray Train takes Ctrl-C for itself where it runs in the main one. Called
    from any other thread, this only does the work.

    Args:
        work: Runs training to its end.
        run: The run's folder.
    """
    clear_request(run)
    if threading.current_thread() is not threading.main_thread():
        return work()
    seen: list[int] = []
    outcome: dict[str, Any] = {}

    def catch(number: int, _: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            sys.exit(128 + number)

    def do() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:  # noqa: BLE001  # raised again below
            outcome["error"] = error

    before = {number: signal.signal(number, catch) for number in _SIGNALS}
    thread = threading.Thread(target=do, daemon=True)
    try:
        thread.start()
        has_asked = False
        while thread.is_alive():
            thread.join(_POLL_S)
            if seen and not has_asked:
                has_asked = True
                request_stop(run)
                print_line(
                    "stopping: a checkpoint is saved after this step; a second "
                    f"{signal.Signals(seen[0]).name} ends the run at once, without one"
                )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def request_stop(run: str) -> None:
    """Ask a run's workers to save and to end."""
    _internal_kv_put(_make_key(run), str(os.getpid()).encode(), overwrite=True)


def is_stop_requested(run: str) -> bool:
    """Whether a run was asked to stop."""
    return _internal_kv_exists(_make_key(run))


def clear_request(run: str) -> None:
    """Forget what an earlier start of the run was asked."""
    _internal_kv_del(_make_key(run))


def _make_key(run: str) -> bytes:
    return f"llava-ray-stop:{run}".encode()
