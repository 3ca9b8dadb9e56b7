"""What a user asks without a conversation: texts to be continued as they are, and tokens.

CompletionRequest -> Prompt -> Engine.stream -> Chunk, beside `chat.py`.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Executor
from contextlib import aclosing, contextmanager

from llava_ray.config import LimitsConfig
from llava_ray.engine.chat import render
from llava_ray.engine.protocol import Engine
from llava_ray.engine.streams import spread, stream_all
from llava_ray.errors import RequestError
from llava_ray.types import Chunk, CompletionRequest, Prompt, TokenizeRequest, Tokens


async def complete(engine: Engine, request: CompletionRequest) -> AsyncGenerator[Chunk]:
    """Yield the answers; closing the iterator aborts them in the engine.

    Raises:
        RequestError, EngineError: see `Engine.stream`.
    """
    prompts = [_make_prompt(request, i) for i in range(len(request.prompts))]
    answers = [each for prompt in prompts for each in spread(prompt, request.answers_each)]
    silent = set(range(len(answers))) if request.echo else set()
    with _names_the_prompt():
        async with aclosing(stream_all(engine, answers)) as chunks:
            async for chunk in chunks:
                if chunk.answer in silent:
                    silent.remove(chunk.answer)
                    said = await _say(engine, answers[chunk.answer])
                    chunk = chunk._replace(text=said + chunk.text)
                yield chunk


async def tokenize(
    engine: Engine,
    request: TokenizeRequest,
    *,
    limits: LimitsConfig,
    executor: Executor | None = None,
) -> Tokens:
    """Return the tokens of a conversation or a text.

    Raises:
        RequestError: see `Engine.tokenize`, `chat.render`.
    """
    source = request.source
    if isinstance(source, str):
        with _names_the_prompt():
            asked = Prompt("tokenize", source, add_special_tokens=request.add_special_tokens)
            return await engine.tokenize(asked)

    def write() -> Prompt:
        return render(engine, source, limits, add_generation_prompt=request.add_generation_prompt)

    loop = asyncio.get_running_loop()
    return await engine.tokenize(await loop.run_in_executor(executor, write))


def _make_prompt(request: CompletionRequest, number: int) -> Prompt:
    asked = request.prompts[number]
    text, token_ids = (asked, ()) if isinstance(asked, str) else ("", asked)
    name = request.request_id if len(request.prompts) == 1 else f"{request.request_id}-{number}"
    return Prompt(name, text, (), request.sampling, token_ids, adapter=request.adapter)


async def _say(engine: Engine, prompt: Prompt) -> str:
    return await engine.detokenize(prompt.token_ids) if prompt.token_ids else prompt.text


@contextmanager
def _names_the_prompt() -> Iterator[None]:
    """Engines name the messages in errors, which most prompts are made of; here there are none."""
    try:
        yield
    except RequestError as error:
        if error.param == "messages":
            error.param = "prompt"
        raise
