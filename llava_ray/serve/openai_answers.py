"""The OpenAI chat API, outwards: chunks become a completion or an event stream, errors a body.

Source: https://platform.openai.com/docs/api-reference/chat/streaming, and what the `openai` client
does with it: it retries 408, 409, 429 and 5xx, and heeds `retry-after` and `x-should-retry`.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from llava_ray.errors import LlavaRayError
from llava_ray.types import Chunk

DONE = b"data: [DONE]\n\n"

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_RETRY_AFTER_S = {429: 5, 503: 1}


class ErrorReply(NamedTuple):
    """How an error is answered over HTTP; the one place where that is decided."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def describe_error(error: LlavaRayError) -> ErrorReply:
    """Return status, body and headers for an error of ours."""
    return describe_failure(error.status, error.message, code=error.code, param=error.param)


def describe_failure(
    status: int, message: str, *, code: str, param: str | None = None
) -> ErrorReply:
    """The same for what has no exception of its own: unknown routes, bugs."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {
        "message": message,
        "type": _ERROR_TYPES.get(status, kind),
        "param": param,
        "code": code,
    }
    headers = {}
    if status in _RETRY_AFTER_S:
        headers["Retry-After"] = str(_RETRY_AFTER_S[status])
    elif status < 500:
        headers["x-should-retry"] = "false"
    return ErrorReply(status, {"error": body}, headers)


def describe_model(name: str, *, created: int) -> dict[str, Any]:
    """Return the model object of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "llava-ray"}


def describe_usage(chunk: Chunk) -> dict[str, Any]:
    """Return the usage object for the last chunk of an answer."""
    return {
        "prompt_tokens": chunk.num_prompt_tokens,
        "completion_tokens": chunk.num_tokens,
        "total_tokens": chunk.num_prompt_tokens + chunk.num_tokens,
        "prompt_tokens_details": {
            "cached_tokens": chunk.num_cached_tokens,
            "image_tokens": chunk.num_image_tokens,
            "text_tokens": chunk.num_prompt_tokens - chunk.num_image_tokens,
            "multimodal_tokens": {"image": chunk.num_image_tokens},  # vLLM's name for it
        },
    }


def build_completion(
    chunks: Iterable[Chunk], *, completion_id: str, model: str, created: int
) -> dict[str, Any]:
    """Return the whole answer as one completion object."""
    *_, last = chunks = list(chunks)
    message = {
        "role": "assistant",
        "content": "".join(chunk.text for chunk in chunks),
        "refusal": None,
    }
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": last.finish_reason,
    }
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": describe_usage(last),
        "system_fingerprint": None,
    }


class ChunkEncoder:
    """Writes the chunks of one answer as server-sent events.

    A token costs one `json.dumps` of its text; all that stays the same is written once.
    """

    def __init__(
        self, *, completion_id: str, model: str, created: int, include_usage: bool
    ) -> None:
        head = {
            "id": completion_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": None,
        }
        self._include_usage = include_usage
        self._head = "data: " + json.dumps(head)[:-1]
        self._tail = ', "usage": null}\n\n' if include_usage else "}\n\n"
        choice = json.dumps(_choice({"content": ""}, None))
        before, after = choice.split('""')
        self._text_head = f'{self._head}, "choices": [{before}'
        self._text_tail = f"{after}]{self._tail}"
        self._has_begun = False

    def encode(self, chunk: Chunk) -> bytes:
        """Return the events for a chunk; nothing for one that adds nothing."""
        events = ""
        if not self._has_begun:
            self._has_begun = True
            events = self._encode_delta({"role": "assistant", "content": "", "refusal": None})
        if chunk.text:
            events += f"{self._text_head}{json.dumps(chunk.text)}{self._text_tail}"
        if chunk.finish_reason:
            events += self._encode_delta({}, chunk.finish_reason)
            if self._include_usage:
                usage = json.dumps(describe_usage(chunk))
                events += f'{self._head}, "choices": [], "usage": {usage}}}\n\n'
        return events.encode()

    def _encode_delta(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = json.dumps(_choice(delta, finish_reason))
        return f'{self._head}, "choices": [{choice}]{self._tail}'


def _choice(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def encode_error(reply: ErrorReply) -> bytes:
    """Return the event that ends a stream which broke after its status had been sent."""
    return f"data: {json.dumps(reply.body)}\n\n".encode()
