"""Opens the way to whoever answers: an engine in this process, a server, the live application."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from llava_ray.client import Client
from llava_ray.config import EvaluateConfig, LimitsConfig
from llava_ray.errors import EngineError, LlavaRayError, RequestError
from llava_ray.evaluate.predict.ask import Answerer, ask, ask_with_retries, run_async
from llava_ray.model.fingerprint import PREFIX
from llava_ray.types import ChatRequest, Chunk, Message, Sampling, TextPart

OWNER = "llava-ray"
"""What `owned_by` of `/v1/models` says for the models of this program."""


async def connect(config: EvaluateConfig, model: str) -> Answerer:
    """Load the engine, or prepare to ask the server or the application."""
    if config.endpoint:
        return Client(config.endpoint).stream
    if config.app:
        from ray import serve

        handle = serve.get_deployment_handle(model, config.app).options(stream=True)
        return lambda request: _ask_app(handle, request)
    from llava_ray.engine.chat import chat
    from llava_ray.engine.factory import load_engine

    engine = await asyncio.to_thread(load_engine, config.describe_model())
    limits = LimitsConfig(max_image_bytes=64 << 20, max_image_pixels=120_000_000)
    return lambda request: chat(engine, request, limits=limits)


async def _ask_app(handle: Any, request: ChatRequest) -> AsyncGenerator[Chunk]:
    """Ask a replica of the live application; Ray's errors become ours."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        async for chunk in handle.chat.remote(request):
            yield chunk
    except (RayError, RayServeException) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, LlavaRayError):
            raise cause from error
        raise EngineError(f"the replica broke: {type(cause).__name__}: {cause}") from error


def fetch_fingerprint(config: EvaluateConfig, model: str) -> str:
    """Return the fingerprint of a live model, which it puts into the answer to a short question.

    Returns:
        "" if it is not served by this program, or tells none.
    """
    if config.app:
        from llava_ray.data.start_ray import start_ray

        start_ray()
    return run_async(_fetch_fingerprint(config, model))


async def _fetch_fingerprint(config: EvaluateConfig, model: str) -> str:
    if config.endpoint:
        async with Client(config.endpoint) as client:
            owners = {each["id"]: each.get("owned_by") for each in await client.describe_models()}
        if owners.get(model) != OWNER:
            return ""
    question = Message("user", (TextPart("Hello"),))
    request = ChatRequest("eval-hello", model, (question,), Sampling(max_tokens=1, temperature=0))
    answer = await connect(config, model)
    try:
        fingerprint = (await ask_with_retries(lambda: ask(answer, request))).last.fingerprint
    except RequestError:  # it takes no such question; it may take the benchmark's
        return ""
    return fingerprint if fingerprint.startswith(PREFIX) else ""
