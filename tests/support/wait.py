"""Waiting for something to become true, however busy the machine is."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil

PATIENCE_S = 60


def wait_until(is_so: Callable[[], object], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Return once it is so; fail with what did not happen if that takes too long."""
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain: {what}"
        time.sleep(0.05)


def wait_until_ready(url: str) -> dict[str, Any]:
    """Return what `/readyz` says once every model answers."""
    replies: list[httpx.Response] = []

    def is_ready() -> bool:
        replies.append(httpx.get(f"{url}/readyz", timeout=PATIENCE_S))
        return replies[-1].status_code == 200

    wait_until(is_ready, f"{url}/readyz is ready")
    return replies[-1].json()


def wait_until_ended(processes: list[psutil.Process]) -> None:
    """Return once none of the processes runs any more."""

    def have_ended() -> bool:
        return not any(map(_is_running, processes))

    wait_until(have_ended, f"the end of {', '.join(map(str, processes))}")


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
