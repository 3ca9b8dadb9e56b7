"""Wait until a condition holds, however busy the machine is."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil

PATIENCE_S = 60


def wait_until(is_so: Callable[[], object], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Poll until `is_so()` is true; fail and name `what` after `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline, f"after {patience_s} s this is still not so: {what}"
        time.sleep(0.05)


def wait_until_ready(url: str) -> dict[str, Any]:
    """Wait until every model is ready; return the body of `/readyz`."""
    replies: list[httpx.Response] = []

    def is_ready() -> bool:
        try:
            replies.append(httpx.get(f"{url}/readyz", timeout=PATIENCE_S))
        except httpx.ConnectError:  # the server does not listen yet
            return False
        return replies[-1].status_code == 200

    wait_until(is_ready, f"{url}/readyz is ready")
    return replies[-1].json()


def wait_until_ended(processes: list[psutil.Process]) -> None:
    """Wait until all of the processes have ended (a zombie counts as ended)."""

    def have_ended() -> bool:
        return not any(map(_is_running, processes))

    wait_until(have_ended, f"the end of {', '.join(map(str, processes))}")


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
