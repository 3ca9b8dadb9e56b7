"""The pipe between a replica and an engine that works for it in another process: lines of JSON.

In, from the replica; `token_ids` have one image token for each image, as `text` has `<image>`:
    {"id", "text", "token_ids", "images": [{"width", "height", "rgb"}], "sampling": {...}}
    {"abort": id}
Out, to the replica:
    {"ready": {}}                       the engine is loaded
    {"id", "ids", "finish", "cached", "logprobs", "num_prompt_tokens"}
                                        new tokens; `finish` is null, "stop" or "length"
    {"id", "error"}                     this request cannot be answered as it is
    {"id", "failed"}                    it could, but the engine failed
    {"stats": {...}}                    once a second, for as long as the engine is well
    {"broken": text}                    it is not, and this process ends

Runs with the standard library alone. What engines print goes to standard error.
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
"""So long this process may take to end by itself when its replica is gone."""
LONGEST_LINE = 1 << 30


class WorkerEngine(Protocol):
    """An engine as a child program wraps it."""

    def stream(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield what is told of a request, but for its id; a ValueError refuses it."""
        ...

    async def check(self) -> dict[str, float]:
        """Return the figures of this moment; raise if the engine is broken."""
        ...


class Link:
    """This end of the pipe."""

    def __init__(self) -> None:
        _end_together()
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)  # nothing that an engine prints comes in between
        self._running: dict[str, asyncio.Task[None]] = {}

    def tell(self, **message: Any) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")

    async def run(self, engine: WorkerEngine) -> None:
        """Answer until the replica is gone or the engine broken."""
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
        except Exception as error:  # noqa: BLE001  # whoever waits for it must be told
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
    """See to it that what this process starts ends with it, and it with its replica.

    Ray kills what a replica has started, but not what that has started in turn: an engine's workers
    would keep their memory. And who loads or hangs does not notice that its replica is gone. So
    another process waits for the other ends of pipes to be closed.
    """
    if os.getpgrp() != os.getpid():  # started by hand: others are in its group
        return
    waiting, held = os.pipe()
    if os.fork():
        os.close(waiting)
        os.register_at_fork(after_in_child=functools.partial(os.close, held))
        return
    os.close(held)
    ends = select.poll()
    for pipe in (waiting, sys.stdin.fileno()):
        ends.register(pipe, 0)  # nothing but that it is closed
    ends.poll()
    ends.unregister(sys.stdin.fileno())
    ends.poll(GRACE_MS)
    os.killpg(0, signal.SIGKILL)


async def _first(pulse: asyncio.Task[None], line: Any) -> bytes:
    """Return the next line; nothing if the engine breaks before."""
    reading = asyncio.ensure_future(line)
    await asyncio.wait([pulse, reading], return_when=asyncio.FIRST_COMPLETED)
    return reading.result() if reading.done() else b""


def read_images(request: dict[str, Any]) -> list[Any]:
    """Return the images of a request, RGB."""
    from PIL import Image

    return [
        Image.frombytes("RGB", (image["width"], image["height"]), base64.b64decode(image["rgb"]))
        for image in request["images"]
    ]


def read_settings() -> dict[str, Any]:
    """Return what the replica wants of the engine: its arguments, by name."""
    return json.loads(sys.argv[1])


def refuse_unknown(names: Any, known: Any) -> None:
    """End this program with a message if there is no such argument of the engine's."""
    import difflib

    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {close[0]}?" if close else "see the engine's own documentation"
            sys.exit(f"llava_ray: unknown setting engine_options.{name}: {hint}")
