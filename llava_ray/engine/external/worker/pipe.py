"""The worker's end of the pipe between a replica and its engine's process: lines of JSON.

In, from the replica; `token_ids` has one image token per image, where `text` has `<image>`:
    {"id", "text", "token_ids", "images": [{"width", "height", "rgb"}], "sampling": {...}}
    {"abort": id}
Out, to the replica:
    {"ready": {}}                       the engine is loaded
    {"id", "ids", "finish", "cached", "logprobs", "num_prompt_tokens"}
                                        new tokens; `finish` is null, "stop" or "length"
    {"id", "error"}                     the request is invalid for this engine
    {"id", "failed"}                    the engine failed at a valid request
    {"stats": {...}}                    once a second, while the engine is healthy
    {"broken": text}                    the engine is broken, and this process ends

Needs the standard library only; `read_images` also needs Pillow. What engines print goes to
standard error, so that it cannot mix with the messages.
"""

import asyncio
import base64
import functools
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import AsyncIterator
from typing import Any, Protocol

PULSE_S = 1.0
GRACE_MS = 5_000
"""How long this process may take to exit by itself after its replica is gone."""
LONGEST_LINE = 1 << 30


class WorkerEngine(Protocol):
    """An engine, wrapped for `WorkerPipe.run`."""

    def stream(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages about a request, without its id; a ValueError refuses it."""
        ...

    async def check(self) -> dict[str, float]:
        """Return the current figures; raise if the engine is broken."""
        ...


class WorkerPipe:
    """The worker's end of the pipe; it takes over standard input and output."""

    def __init__(self) -> None:
        _end_together()
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)  # what an engine prints must not mix with the messages
        self._running: dict[str, asyncio.Task[None]] = {}

    def tell(self, **message: Any) -> None:
        """Send a message to the replica."""
        self._out.write(json.dumps(message).encode() + b"\n")

    async def run(self, engine: WorkerEngine) -> None:
        """Serve requests until the replica is gone or the engine is broken."""
        self.tell(ready={})
        pulse = asyncio.create_task(self._beat(engine))
        reader = asyncio.StreamReader(limit=LONGEST_LINE)
        here = asyncio.get_running_loop()
        await here.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while not pulse.done() and (line := await _first(pulse, reader.readline())):
            self._take(engine, json.loads(line))

    def _take(self, engine: WorkerEngine, message: dict[str, Any]) -> None:
        if name := message.get("abort"):
            if task := self._running.pop(name, None):
                task.cancel()
            return
        name = message["id"]
        task = asyncio.create_task(self._answer(engine, message))
        self._running[name] = task
        task.add_done_callback(lambda _: self._running.pop(name, None))

    async def _answer(self, engine: WorkerEngine, request: dict[str, Any]) -> None:
        try:
            async for told in engine.stream(request):
                self.tell(id=request["id"], **told)
        except ValueError as error:
            self.tell(id=request["id"], error=str(error))
        except Exception as error:  # noqa: BLE001  # the replica waits for an answer
            traceback.print_exc()
            self.tell(id=request["id"], failed=f"{type(error).__name__}: {error}")

    async def _beat(self, engine: WorkerEngine) -> None:
        while True:
            try:
                self.tell(stats=await engine.check())
            except Exception as error:  # noqa: BLE001  # whatever it is, the engine is broken
                self.tell(broken=f"{type(error).__name__}: {error}")
                return
            await asyncio.sleep(PULSE_S)


def _end_together() -> None:
    """Make sure that this process ends with its replica, and its own children with it.

    Ray kills the children of a replica but not their children: an engine's workers would keep their
    memory. And a process that is loading or hanging does not notice that its replica is gone. So a
    watchdog process waits until the pipe to this process or to the replica closes, and kills the
    whole process group at most `GRACE_MS` later.
    """
    if os.getpgrp() != os.getpid():  # started by hand: other processes share its group
        return
    waiting, held = os.pipe()
    if os.fork():
        os.close(waiting)
        os.register_at_fork(after_in_child=functools.partial(os.close, held))
        return
    os.close(held)
    ends = select.poll()
    for pipe in (waiting, sys.stdin.fileno()):
        ends.register(pipe, 0)  # report only that it was closed
    ends.poll()
    ends.unregister(sys.stdin.fileno())
    ends.poll(GRACE_MS)
    os.killpg(0, signal.SIGKILL)


async def _first(pulse: asyncio.Task[None], line: Any) -> bytes:
    """Return the next line; empty if the engine breaks first."""
    reading = asyncio.ensure_future(line)
    await asyncio.wait([pulse, reading], return_when=asyncio.FIRST_COMPLETED)
    return reading.result() if reading.done() else b""


def read_images(request: dict[str, Any]) -> list[Any]:
    """Return the images of a request as RGB images of Pillow."""
    from PIL import Image

    return [
        Image.frombytes("RGB", (image["width"], image["height"]), base64.b64decode(image["rgb"]))
        for image in request["images"]
    ]


def read_settings() -> dict[str, Any]:
    """Return the engine's arguments by name, from this program's command line."""
    return json.loads(sys.argv[1])


def refuse_unknown(names: Any, known: Any) -> None:
    """Exit with a message if any of `names` is not among the engine's `known` arguments."""
    import difflib

    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {close[0]}?" if close else "see the engine's own documentation"
            sys.exit(f"llava_ray: unknown setting engine_options.{name}: {hint}")
