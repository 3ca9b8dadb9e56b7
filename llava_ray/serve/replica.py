"""One replica of one model: the worker that Ray Serve starts, watches and multiplies.

ChatRequest -> images.decode -> template.render -> Prompt -> Engine.stream -> Chunk, streamed.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from llava_ray import images
from llava_ray.config import LimitsConfig, ModelConfig
from llava_ray.serve import console
from llava_ray.types import ChatRequest, Chunk, ImagePart, Message, Prompt, TextPart

DECODES_AT_ONCE = 2
"""Conversations whose pictures are decoded at the same time; bounds the memory that takes."""


class Replica:
    """Holds one engine and answers the chats that Serve routes to it."""

    def __init__(self, model: ModelConfig, limits: LimitsConfig) -> None:
        from llava_ray.engine.load import load_engine

        console.set_up()
        console.logger.info(
            f"loading {model.name!r} from {model.path!r} with the {model.engine} engine"
        )
        started = time.monotonic()
        self._engine = load_engine(model)
        self._limits = limits
        self._renderer = ThreadPoolExecutor(DECODES_AT_ONCE, thread_name_prefix="render")
        hello = Message("user", (TextPart("Hello"),))
        self._engine.template.render([hello])  # compiled before the first user waits for it
        console.logger.info(f"{model.name!r} is ready after {time.monotonic() - started:.1f} s")

    async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        """Stream the answer; leaving the iterator aborts the request in the engine."""
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._renderer, self._render, request)
        async with aclosing(self._engine.stream(prompt)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def check_health(self) -> None:
        """Called by Serve; raises when the engine does not work, and Serve replaces the replica."""
        await self._engine.check()

    async def stats(self) -> dict[str, float]:
        return self._engine.stats()

    async def __del__(self) -> None:
        # Serve awaits this when it retires a replica; the constructor may have failed.
        if engine := getattr(self, "_engine", None):
            await engine.close()

    def _render(self, request: ChatRequest) -> Prompt:
        pictures = [
            images.decode(part.data, limits=self._limits, param=part.param)
            for message in request.messages
            for part in message.parts
            if isinstance(part, ImagePart)
        ]
        text = self._engine.template.render(request.messages)
        return Prompt(request.request_id, text, tuple(pictures), request.sampling)
