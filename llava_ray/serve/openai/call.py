"""A parsed call of the OpenAI API: the request, and how to write its response."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from llava_ray.serve.openai.streaming import ResponseFormatter, ResponseMeta
from llava_ray.types import ChatRequest, CompletionRequest

Parsed = TypeVar("Parsed")

_LARGE_BODY_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ApiCall:
    """A request, and how to write its answers.

    Attributes:
        stream: as server-sent events instead of one JSON object.
        include_usage: whether the stream ends with the token counts.
    """

    request: ChatRequest | CompletionRequest
    formatter: ResponseFormatter
    meta: ResponseMeta
    stream: bool
    include_usage: bool


async def parse_body(parse: Callable[..., Parsed], body: bytes, **options: Any) -> Parsed:
    """Return `parse(body, **options)`; large bodies are parsed in a thread, not to block others."""
    if len(body) > _LARGE_BODY_BYTES:
        return await asyncio.to_thread(parse, body, **options)
    return parse(body, **options)
