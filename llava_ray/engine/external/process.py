"""The child process of an external engine, and this end of the pipe; `worker/pipe.py` is the other.

Two threads serve it: one reads its messages and passes each to the request it belongs to, the other
keeps the last lines of its output for error messages. When the process ends, all open requests fail
at once.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from llava_ray.errors import ConfigError, EngineError
from llava_ray.priority import take_precedence

SILENCE_S = 30.0
"""A process that sends nothing for this long counts as stuck: it sends figures once a second."""

_PRINTED_LINES = 12


class ResponseQueue:
    """Receives the messages about one request, in the event loop that created it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.messages: asyncio.Queue[dict[str, Any] | EngineError] = asyncio.Queue()

    def tell(self, message: dict[str, Any] | EngineError) -> None:
        """Add a message, from any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(self.messages.put_nowait, message)


class EngineProcess:
    """A child process with an engine; constructing it starts the program and waits until it is
    ready.

    Args:
        command: the program and its arguments.
        name: the engine's name, for messages.
        environment: environment variables to add to those of this process.
        timeout_s: time to become ready, in seconds.

    Raises:
        ConfigError: the program ended or was not ready in time; the message ends with its last
            lines of output.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        environment: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        self._name = name
        self._responses: dict[str, ResponseQueue] = {}
        self._lock = threading.Lock()
        self._printed: deque[str] = deque(maxlen=_PRINTED_LINES)
        self._ready = threading.Event()
        self._problem = ""
        self._heard_at = time.monotonic()
        take_precedence()  # the program inherits the priority
        try:
            self._process: Any = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **environment},
                start_new_session=True,  # so that all its processes can be ended together
            )
        except OSError as error:
            raise ConfigError(
                f"cannot start {name} with {command[0]!r} ({error.strerror}): set "
                "engine_options.python to the Python of its environment"
            ) from error
        self._threads = [
            threading.Thread(target=work, name=f"{name}{work.__name__}", daemon=True)
            for work in (self._keep_printed, self._listen)
        ]
        for thread in self._threads:
            thread.start()
        is_in_time = self._ready.wait(timeout_s)
        if self._problem or not is_in_time:
            what = self._problem or f"was not ready after {timeout_s:.0f} s"
            self.close()
            raise ConfigError(f"{name} {what}; it printed last:\n" + "\n".join(self._printed))

    def ask(self, name: str, message: dict[str, Any], responses: ResponseQueue) -> None:
        """Send a request; messages about it go to `responses`.

        Raises:
            EngineError: the process has ended.
        """
        with self._lock:
            self._check()
            self._responses[name] = responses
        self._send({"id": name, **message})

    def forget(self, name: str, *, is_over: bool) -> None:
        """Drop a request, and abort it in the process unless it `is_over`."""
        with self._lock:
            self._responses.pop(name, None)
        if not is_over:
            with contextlib.suppress(EngineError):  # then nothing is left to abort
                self._send({"abort": name})

    def check(self) -> None:
        """Raise an EngineError if the process has ended or is stuck."""
        self._check()
        silent_s = time.monotonic() - self._heard_at
        if silent_s > SILENCE_S:
            raise EngineError(f"{self._name} is stuck: it has sent nothing for {silent_s:.0f} s")

    def close(self) -> None:
        """Kill the process and all processes that it has started."""
        self._problem = self._problem or "was closed"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(OSError):  # a partial message may be left in the buffer
            self._process.stdin.close()

    def _check(self) -> None:
        if self._problem:
            raise EngineError(f"{self._name} {self._problem}: try again in a moment")

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        except OSError as error:
            raise EngineError(f"{self._name} no longer reads requests: try again") from error

    def _keep_printed(self) -> None:
        with self._process.stderr as printed:
            for line in printed:
                self._printed.append(line.decode(errors="replace").rstrip())

    def _listen(self) -> None:
        with self._process.stdout as told:
            for line in told:
                self._heard_at = time.monotonic()
                self._hand_over(json.loads(line))
        self._end("has ended")

    def _hand_over(self, message: dict[str, Any]) -> None:
        if "broken" in message:
            self._end(f"is broken ({message['broken']})")
        elif "ready" in message:
            self._ready.set()
        elif "id" in message:
            with self._lock:
                responses = self._responses.get(message["id"])
            if responses:
                responses.tell(message)

    def _end(self, problem: str) -> None:
        with self._lock:
            self._problem = self._problem or problem
            asked, self._responses = list(self._responses.values()), {}
        for responses in asked:
            responses.tell(EngineError(f"{self._name} {self._problem}: try again in a moment"))
        self._ready.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and all that it has started
