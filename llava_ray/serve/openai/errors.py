"""JSON of the OpenAI API for errors, models and usage; `streaming.py` writes completions.

Statuses and headers suit the `openai` client, which retries 408, 409, 429 and 5xx and respects
`retry-after` and `x-should-retry`.
"""

import json
import math
from typing import Any, NamedTuple

from llava_ray.errors import LlavaRayError
from llava_ray.serve.usage import Usage

DONE = b"data: [DONE]\n\n"

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_RETRY_AFTER_S = {429: 5, 503: 1}
_LONGEST_RETRY_S = 60  # clients wait no longer than this and would retry too early


class ErrorReply(NamedTuple):
    """An error as an HTTP response."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def describe_error(error: LlavaRayError) -> ErrorReply:
    """Return the HTTP response for an error of ours; the only place that decides it."""
    reply = describe_failure(error.status, error.message, code=error.code, param=error.param)
    if error.retry_after_s is not None:
        reply.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        if error.retry_after_s > _LONGEST_RETRY_S:
            reply.headers["x-should-retry"] = "false"
    return reply


def describe_failure(
    status: int, message: str, *, code: str, param: str | None = None
) -> ErrorReply:
    """Return the HTTP response for a failure without an exception of ours: no route, a bug."""
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
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return ErrorReply(status, {"error": body}, headers)


def describe_model(
    name: str, *, created: int, context_length: int | None = None, parent: str | None = None
) -> dict[str, Any]:
    """Return the model object of `/v1/models`; the last two fields are extensions of vLLM.

    Args:
        parent: the base model's name if this is an adapter.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "llava-ray",
        "max_model_len": context_length,
        "parent": parent,
    }


def describe_usage(usage: Usage) -> dict[str, Any]:
    """Return the `usage` object of a response."""
    num_text_tokens = usage.num_prompt_tokens - usage.num_image_tokens
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.num_cached_tokens,
            "image_tokens": usage.num_image_tokens,
            "text_tokens": num_text_tokens,
            "multimodal_tokens": {"image": usage.num_image_tokens},  # vLLM's name for it
        },
    }


def encode_error(reply: ErrorReply) -> bytes:
    """Return the event for an error after the HTTP status has been sent."""
    return f"data: {json.dumps(reply.body)}\n\n".encode()
