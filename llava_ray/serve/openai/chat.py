"""Parses requests of the OpenAI chat API: an untrusted JSON body -> `ChatRequest`, or an error.

`protocol.py` has the fields beside the messages, `messages.py` reads the messages, and
`streaming.py` writes the responses. `completions.py` parses plain completions.
Source: https://platform.openai.com/docs/api-reference/chat, and vLLM's extensions to it.
"""

import time
from collections.abc import Mapping
from typing import Any

from llava_ray.config import LimitsConfig
from llava_ray.errors import RequestError, UnsupportedError
from llava_ray.serve.openai.call import ApiCall
from llava_ray.serve.openai.messages import read_messages
from llava_ray.serve.openai.protocol import (
    ChatBody,
    check_options,
    wants_continuous_usage,
    wants_usage,
)
from llava_ray.serve.openai.response_format import read_format
from llava_ray.serve.openai.sampling import read_num_answers, read_sampling
from llava_ray.serve.openai.streaming import ChatFormatter, ResponseMeta
from llava_ray.serve.openai.validation import load_json
from llava_ray.types import ChatRequest, Message


def parse_chat(
    body: bytes | Mapping[str, Any], *, limits: LimitsConfig, request_id: str
) -> ApiCall:
    """Check and parse the JSON body of `/v1/chat/completions`.

    Raises:
        RequestError: it is invalid; `param` names the field, the message says what to do.
    """
    body = dict(body) if isinstance(body, Mapping) else load_json(body)
    options, ignored = check_options(body, ChatBody, limits)
    messages = read_messages(options.messages, limits)
    _check_end(options, messages)
    sampling = read_sampling(
        options,
        max_tokens=_read_max_tokens(options),
        num_logprobs=_read_num_logprobs(options),
        json_schema=read_format(options.response_format),
        may_cut=limits.excess_max_tokens == "cut",
    )
    num_answers = read_num_answers(options, limits)
    request = ChatRequest(request_id, options.model, messages, sampling, num_answers)
    return ApiCall(
        request,
        ChatFormatter(has_logprobs=sampling.num_logprobs is not None),
        ResponseMeta(request_id, options.model, int(time.time()), num_answers, num_answers),
        stream=bool(options.stream),
        include_usage=wants_usage(options),
        continuous_usage=wants_continuous_usage(options),
        ignored=ignored,
        max_tokens_field=(
            "max_tokens" if options.max_completion_tokens is None else "max_completion_tokens"
        ),
    )


def _check_end(options: ChatBody, messages: tuple[Message, ...]) -> None:
    """Raise an error for fields that contradict who speaks last.

    A last message of the assistant is continued, and one of the user is answered.
    """
    is_continued = messages[-1].role == "assistant"
    if is_continued and options.continue_final_message is False:
        raise UnsupportedError(
            "continue_final_message is false, but a last message of the assistant is always "
            "continued: leave it out, or end with a user message",
            param="continue_final_message",
        )
    if not is_continued and options.continue_final_message:
        raise RequestError(
            "continue_final_message is true, but there is no last message of the assistant to "
            "continue: add one, or leave it out",
            param="continue_final_message",
        )
    if not is_continued and options.add_generation_prompt is False:
        raise UnsupportedError(
            "add_generation_prompt is false, but a user message is always answered: leave it out",
            param="add_generation_prompt",
        )


def _read_num_logprobs(options: ChatBody) -> int | None:
    if options.top_logprobs and not options.logprobs:
        raise RequestError(
            "top_logprobs is set, but logprobs is not: set logprobs to true or leave it out",
            param="top_logprobs",
        )
    return options.top_logprobs or 0 if options.logprobs else None


def _read_max_tokens(options: ChatBody) -> int | None:
    limit, older = options.max_completion_tokens, options.max_tokens
    if limit is not None and older is not None and limit != older:
        raise RequestError(
            f"max_tokens={older} and max_completion_tokens={limit} disagree: send one of them",
            param="max_completion_tokens",
        )
    return limit or older
