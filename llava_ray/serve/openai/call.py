"""What every body of the OpenAI API begins as, and what it becomes: JSON -> a call."""

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
    """A request, and how its answers are to be written."""

    request: ChatRequest | CompletionRequest
    formatter: ResponseFormatter
    meta: ResponseMeta
    stream: bool
    include_usage: bool


async def parse_body(parse: Callable[..., Parsed], body: bytes, **options: Any) -> Parsed:
    """Return what `parse` makes of a body; of a large one in a thread, so that others go on."""
    if len(body) > _LARGE_BODY_BYTES:
        return await asyncio.to_thread(parse, body, **options)
    return parse(body, **options)
