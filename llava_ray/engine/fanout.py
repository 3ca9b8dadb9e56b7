"""Streams several answers of one request at once: `n` answers to a prompt, or several prompts.

`chat.py` splits a request with `fan_out`, and `stream_all` merges the engine's streams into one.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

from llava_ray.engine.protocol import Engine
from llava_ray.types import Chunk, Prompt


def fan_out(prompt: Prompt, num_answers: int) -> list[Prompt]:
    """Return one prompt per answer; answer i is drawn with seed + i, as in vLLM."""
    if num_answers == 1:
        return [prompt]
    seed = prompt.sampling.seed
    return [
        replace(
            prompt,
            request_id=f"{prompt.request_id}-{i}",
            sampling=replace(prompt.sampling, seed=None if seed is None else seed + i),
        )
        for i in range(num_answers)
    ]


async def stream_all(engine: Engine, prompts: Sequence[Prompt]) -> AsyncGenerator[Chunk]:
    """Yield the chunks of all prompts as they come; `Chunk.answer` is the index of their prompt.

    Closing the iterator, or an error in any stream, aborts all of them.

    Raises:
        RequestError, EngineError: see `Engine.stream`.
    """
    if len(prompts) == 1:
        async with aclosing(engine.stream(prompts[0])) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(aclosing(engine.stream(prompt))) for prompt in prompts
        ]
        news = {asyncio.create_task(_next(stream)): i for i, stream in enumerate(streams)}
        stack.push_async_callback(_cancel, news)
        while news:
            done, _ = await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=news.__getitem__):
                index = news.pop(task)
                chunk = task.result()
                if chunk.finish_reason is None:
                    news[asyncio.create_task(_next(streams[index]))] = index
                yield chunk._replace(answer=index)


async def _next(stream: AsyncGenerator[Chunk]) -> Chunk:
    return await anext(stream)


async def _cancel(tasks: dict[asyncio.Task[Chunk], int]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
