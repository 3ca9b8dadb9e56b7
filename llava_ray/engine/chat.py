"""From a request to the chunks of its answers: what a Serve replica and the command line share.

`chat` answers a conversation or a prompt, `complete` answers the prompts of a text completion,
`tokenize` counts and returns tokens without answering. The way of a conversation:
ChatRequest -> images.decode -> template.render -> Prompt -> Engine.stream -> Chunk
A PromptRequest takes the same way without the template.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial

from PIL.Image import Image

from llava_ray import images
from llava_ray.config import LimitsConfig
from llava_ray.engine.fanout import fan_out, stream_all
from llava_ray.engine.protocol import Engine
from llava_ray.errors import RequestError
from llava_ray.types import (
    ChatRequest,
    Chunk,
    CompletionRequest,
    ImagePart,
    Prompt,
    PromptRequest,
    Request,
    TokenizeRequest,
    Tokens,
)


async def chat(
    engine: Engine,
    request: Request,
    *,
    limits: LimitsConfig,
    executor: Executor | None = None,
    note_decode: Callable[[float], None] = lambda seconds: None,
    note_render: Callable[[float], None] = lambda seconds: None,
) -> AsyncGenerator[Chunk]:
    """Yield the chunks of one or more answers; closing the iterator aborts them in the engine.

    Models begin an answer with white space because prompts end in "ASSISTANT:"; it is stripped from
    answers to a conversation. What continues a prompt, or a last message of the assistant, is
    yielded unchanged.

    Args:
        engine: computes the answers.
        request: the conversation or the prompt.
        limits: limits on its images.
        executor: decodes images; by default the event loop's own threads.
        note_decode: called in a thread of `executor` with the seconds that each image took to
            decode.
        note_render: called with the seconds that decoding and rendering took, including the wait
            for a thread.

    Raises:
        RequestError, EngineError: see `Engine.stream`, `images.decode`, `Template.render`.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    prompt = await loop.run_in_executor(
        executor, partial(render, engine, request, limits, note_decode=note_decode)
    )
    note_render(loop.time() - started)
    begun = set() if _is_question(request) else set(range(request.num_answers))
    prompts = fan_out(prompt, request.num_answers)
    async with aclosing(stream_all(engine, prompts)) as chunks:
        async for chunk in chunks:
            if chunk.answer not in begun:
                chunk = chunk._replace(text=chunk.text.lstrip())
                if chunk.text:
                    begun.add(chunk.answer)
            yield chunk


async def complete(engine: Engine, request: CompletionRequest) -> AsyncGenerator[Chunk]:
    """Yield the answers to a text completion; closing the iterator aborts them in the engine.

    With `echo`, each answer begins with its prompt.

    Raises:
        RequestError, EngineError: see `Engine.stream`.
    """
    prompts = [_make_prompt(request, i) for i in range(len(request.prompts))]
    answers = [each for prompt in prompts for each in fan_out(prompt, request.answers_each)]
    unechoed = set(range(len(answers))) if request.echo else set()
    with _blame_prompt():
        async with aclosing(stream_all(engine, answers)) as chunks:
            async for chunk in chunks:
                if chunk.answer in unechoed:
                    unechoed.remove(chunk.answer)
                    text = await _get_prompt_text(engine, answers[chunk.answer])
                    chunk = chunk._replace(text=text + chunk.text)
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
        RequestError: see `Engine.tokenize`, `images.decode`, `Template.render`.
    """
    source = request.source
    if isinstance(source, str):
        with _blame_prompt():
            asked = Prompt("tokenize", source, add_special_tokens=request.add_special_tokens)
            return await engine.tokenize(asked)

    def render_source() -> Prompt:
        return render(engine, source, limits, add_generation_prompt=request.add_generation_prompt)

    loop = asyncio.get_running_loop()
    return await engine.tokenize(await loop.run_in_executor(executor, render_source))


def render(
    engine: Engine,
    request: Request,
    limits: LimitsConfig,
    *,
    add_generation_prompt: bool = True,
    note_decode: Callable[[float], None] = lambda seconds: None,
) -> Prompt:
    """Return the prompt of a request, with its images decoded.

    The answer to a conversation ends at the template's stop texts as well as at the request's own.
    Answers in JSON do not: their grammar ends them, and they may contain such texts.
    """
    if isinstance(request, PromptRequest):
        decoded = tuple(_decode(part, limits, note_decode) for part in request.images)
        return Prompt(
            request.request_id, request.prompt, decoded, request.sampling, adapter=request.adapter
        )
    decoded = tuple(
        _decode(part, limits, note_decode)
        for message in request.messages
        for part in message.parts
        if isinstance(part, ImagePart)
    )
    template, sampling = engine.template, request.sampling
    text = template.render(request.messages, add_generation_prompt=add_generation_prompt)
    if not sampling.ignore_eos and sampling.json_schema is None:
        sampling = replace(sampling, stop=(*sampling.stop, *template.stop))
    return Prompt(request.request_id, text, decoded, sampling, adapter=request.adapter)


def _is_question(request: Request) -> bool:
    """Whether a whole answer is wanted, not the rest of a text."""
    return isinstance(request, ChatRequest) and request.messages[-1].role == "user"


def _decode(part: ImagePart, limits: LimitsConfig, note_decode: Callable[[float], None]) -> Image:
    started = time.perf_counter()
    image = images.decode(part, limits=limits)
    note_decode(time.perf_counter() - started)
    return image


def _make_prompt(request: CompletionRequest, number: int) -> Prompt:
    asked = request.prompts[number]
    text, token_ids = (asked, ()) if isinstance(asked, str) else ("", asked)
    name = request.request_id if len(request.prompts) == 1 else f"{request.request_id}-{number}"
    return Prompt(name, text, (), request.sampling, token_ids, adapter=request.adapter)


async def _get_prompt_text(engine: Engine, prompt: Prompt) -> str:
    return await engine.detokenize(prompt.token_ids) if prompt.token_ids else prompt.text


@contextmanager
def _blame_prompt() -> Iterator[None]:
    """Name `prompt` in errors that blame `messages`, as engines do: these requests have none."""
    try:
        yield
    except RequestError as error:
        if error.param == "messages":
            error.param = "prompt"
        raise
