"""One chat, from the records of a request to the pieces of its answer.

The spine that a Serve replica and the command line share:
ChatRequest -> images.decode -> template.render -> Prompt -> Engine.stream -> Chunk
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import replace

from llava_ray import images
from llava_ray.config import LimitsConfig
from llava_ray.engine.protocol import Engine
from llava_ray.types import ChatRequest, Chunk, ImagePart, Prompt


async def chat(
    engine: Engine,
    request: ChatRequest,
    *,
    limits: LimitsConfig,
    executor: Executor | None = None,
    note_render: Callable[[float], None] = lambda seconds: None,
) -> AsyncGenerator[Chunk]:
    """Yield the answer; closing the iterator aborts the request in the engine.

    The white space with which models begin an answer, because prompts end in "ASSISTANT:", is
    left out.

    Args:
        engine: answers.
        request: the conversation.
        limits: what its pictures may be.
        executor: decodes pictures; default: the event loop's own threads.
        note_render: told how long decoding and rendering took.

    Raises:
        RequestError, EngineError: see `Engine.stream`, `images.decode`, `Template.render`.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    prompt = await loop.run_in_executor(executor, render, engine, request, limits)
    note_render(loop.time() - started)
    has_begun = False
    async with aclosing(engine.stream(prompt)) as chunks:
        async for chunk in chunks:
            if not has_begun:
                chunk = chunk._replace(text=chunk.text.lstrip())
                has_begun = bool(chunk.text)
            yield chunk


def render(engine: Engine, request: ChatRequest, limits: LimitsConfig) -> Prompt:
    """Return the prompt for a request, its pictures decoded.

    An answer ends at the template's stop texts as well as at those that were asked for.
    """
    pictures = tuple(
        images.decode(part, limits=limits)
        for message in request.messages
        for part in message.parts
        if isinstance(part, ImagePart)
    )
    template, sampling = engine.template, request.sampling
    text = template.render(request.messages)
    if not sampling.ignore_eos:
        sampling = replace(sampling, stop=(*sampling.stop, *template.stop))
    return Prompt(request.request_id, text, pictures, sampling)
