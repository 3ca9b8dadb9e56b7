"""The worker program of a scripted engine: it repeats a prompt's tokens, one at a time.

For images it returns their sizes and the colour of their first pixel, as token ids. The seeds in
`MISCHIEF` make it misbehave.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "llava_ray/engine/external/worker"))

from pipe import WorkerPipe, read_images, read_settings, refuse_unknown

MISCHIEF = {"refuse": 1, "stay silent": 2, "break": 3, "fail": 4, "miscount": 5}


class Scripted:
    def __init__(self, settings: dict[str, Any]) -> None:
        refuse_unknown(settings, {"folder", "image_tokens", "pause_s", "fails", "starts", "hangs"})
        self._image_tokens = settings["image_tokens"]
        self._pause_s = settings.get("pause_s", 0)
        self._num_running = 0
        self._is_broken = False
        print("what an engine prints does not come in between")

    async def stream(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        wanted = request["sampling"]
        seed = wanted["seed"]
        if seed == MISCHIEF["refuse"]:
            raise ValueError("this is not for me")
        if seed == MISCHIEF["fail"]:
            raise ZeroDivisionError("a fault of mine")
        images = read_images(request)
        ids = [] if images else request["token_ids"]
        for image in images:
            ids += [*image.size, *image.getpixel((0, 0))]
        self._is_broken = seed == MISCHIEF["break"]
        self._num_running += 1
        try:
            if seed in (MISCHIEF["stay silent"], MISCHIEF["break"]):
                await asyncio.sleep(3600)
            ids = ids[: wanted["max_tokens"]]
            for number, id_ in enumerate(ids, 1):
                await asyncio.sleep(self._pause_s)
                reason = "length" if number == wanted["max_tokens"] else "stop"
                yield {
                    "ids": [id_],
                    "finish": reason if number == len(ids) else None,
                    "num_prompt_tokens": self._count_tokens(request),
                    "cached": self._num_running,  # so that a test sees who else is there
                    "logprobs": [[-0.5, [[id_, -0.5]]]],
                }
        finally:
            self._num_running -= 1

    def _count_tokens(self, request: dict[str, Any]) -> int:
        if request["sampling"]["seed"] == MISCHIEF["miscount"]:
            return 1
        return len(request["token_ids"]) + len(request["images"]) * (self._image_tokens - 1)

    async def check(self) -> dict[str, float]:
        if self._is_broken:
            raise RuntimeError("a process of mine has ended")
        return {"num_running": self._num_running}


if __name__ == "__main__":
    settings = read_settings()
    if settings.get("fails"):
        sys.exit("no such device")
    pipe = WorkerPipe()
    if settings.get("starts"):
        subprocess.Popen(settings["starts"])
    if settings.get("hangs"):
        pipe.tell(ready={})
        signal.pause()
    asyncio.run(pipe.run(Scripted(settings)))
