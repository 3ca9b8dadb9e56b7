"""A parsed call of the OpenAI API: the request, and how to write its response."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from llava_ray.errors import RequestError
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
        continuous_usage: whether each of its events has the token counts so far.
        ignored: the names of the request's fields that have no effect.
        max_tokens_field: by what name the request bounds the answer.
    """

    request: ChatRequest | CompletionRequest
    formatter: ResponseFormatter
    meta: ResponseMeta
    stream: bool
    include_usage: bool
    continuous_usage: bool = False
    ignored: tuple[str, ...] = ()
    max_tokens_field: str = "max_tokens"

    def blame(self, error: RequestError) -> RequestError:
        """Return an error that names the field which the request has, not the other spelling."""
        name = self.max_tokens_field
        if error.param != "max_tokens" or name == "max_tokens":
            return error
        return type(error)(error.message.replace("max_tokens", name), param=name)


async def parse_body(parse: Callable[..., Parsed], body: bytes, **options: Any) -> Parsed:
    """Return `parse(body, **options)`; large bodies are parsed in a thread, not to block others."""
    if len(body) > _LARGE_BODY_BYTES:
        return await asyncio.to_thread(parse, body, **options)
    return parse(body, **options)
