"""`llava-ray chat`: a conversation with a server, or with a model in this process."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_ray.cli.console import notes
from llava_ray.cli.talk import Answerer, Talk, read_image
from llava_ray.client import DEFAULT_URL, Client
from llava_ray.config import DEMO_MODEL, EngineName, LimitsConfig, ModelConfig
from llava_ray.errors import UserError
from llava_ray.types import ChatRequest, Chunk, Sampling


def chat(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE", help="Images to talk about.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer and exit.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of a served model (default: the first); with --local a folder or hub name."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help=f"Address of a server; default: {DEFAULT_URL}, if one answers there."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Load the model in this process, without a server.")
    ] = False,
    engine: Annotated[
        EngineName, typer.Option(help="What computes, where no server does.")
    ] = "torch",
    temperature: Annotated[
        float, typer.Option(metavar="N", min=0, max=2, help="0: greedy decoding.")
    ] = 0.2,
    top_p: Annotated[
        float, typer.Option(metavar="N", min=0.01, max=1, help="Nucleus sampling.")
    ] = 0.7,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 512,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")
    ] = None,
) -> None:
    """Talk about images in the terminal, with a server or without one.

    A server is asked if one answers; otherwise the model is loaded in this process.
    """
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    shown = [read_image(path) for path in images or []]
    with asyncio.Runner() as runner:
        name, answer, close = runner.run(_connect(model, url=url, local=local, engine=engine))
        try:
            talk = Talk(runner, answer, name, sampling)
            if prompt is not None:
                sys.exit(0 if talk.say(prompt, shown) else 130)
            talk.run(shown)
        finally:
            runner.run(close())


async def _connect(
    model: str | None, *, url: str | None, local: bool, engine: EngineName
) -> tuple[str, Answerer, Callable[[], Coroutine[Any, Any, None]]]:
    """Find who answers; return the model's name, how to ask it and how to close it."""
    if local and url:
        raise UserError("--local needs no server and --url names one: give one of them")
    client = Client(url or DEFAULT_URL)
    if not local and (url or await client.is_up()):
        names = await client.list_models()
        if not names:
            raise UserError(
                f"the server at {client.base_url} serves no model yet: try again in a moment"
            )
        return model or names[0], client.stream, client.close
    await client.close()
    config = ModelConfig(path=model or DEMO_MODEL, engine=engine)
    return await _load(config)


async def _load(
    config: ModelConfig,
) -> tuple[str, Answerer, Callable[[], Coroutine[Any, Any, None]]]:
    """Load a model in this process."""
    from llava_ray.engine.chat import chat
    from llava_ray.engine.factory import load_engine

    with notes.status(f"loading {config.path} with the {config.engine} engine"):
        engine = load_engine(config)

    def answer(request: ChatRequest) -> AsyncGenerator[Chunk]:
        return chat(engine, request, limits=LimitsConfig())

    return config.name, answer, engine.close
