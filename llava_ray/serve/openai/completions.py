"""Parses requests for plain completions, /tokenize and /detokenize from untrusted JSON bodies.

Sources: https://platform.openai.com/docs/api-reference/completions, and vLLM's /tokenize and
/detokenize.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_ray.config import LimitsConfig
from llava_ray.errors import RequestError
from llava_ray.serve.openai.call import ApiCall
from llava_ray.serve.openai.messages import read_messages
from llava_ray.serve.openai.protocol import (
    LARGEST_TOKEN_ID,
    Checked,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    check_body,
    check_options,
    wants_continuous_usage,
    wants_usage,
)
from llava_ray.serve.openai.sampling import read_num_answers, read_sampling
from llava_ray.serve.openai.streaming import CompletionFormatter, ResponseMeta
from llava_ray.serve.openai.validation import (
    check_unicode,
    kind_of,
    load_json,
)
from llava_ray.types import ChatRequest, CompletionRequest, TokenizeRequest

DEFAULT_MAX_TOKENS = 16
_PROMPT_REMEDY = "send a string, a list of strings, a list of token ids, or a list of such lists"


def parse_completion(
    body: bytes | Mapping[str, Any], *, limits: LimitsConfig, request_id: str
) -> ApiCall:
    """Check and parse the JSON body of `/v1/completions`.

    Raises:
        RequestError: it is invalid; `param` names the field, the message says what to do.
    """
    body = dict(body) if isinstance(body, Mapping) else load_json(body)
    options, ignored = check_options(body, CompletionBody, limits)
    prompts = _read_prompts(options.prompt)
    answers_each = read_num_answers(options, limits)
    num_answers = len(prompts) * answers_each
    if num_answers > limits.max_answers:
        raise RequestError(
            f"{num_answers} answers, {answers_each} to each prompt, are more than the "
            f"{limits.max_answers} allowed: send fewer prompts",
            param="prompt",
        )
    if options.echo and options.logprobs is not None:
        raise RequestError(
            "echo with logprobs asks for those of the prompt, which this server does not return: "
            "leave one of them out",
            param="echo",
        )
    max_tokens = options.max_tokens or DEFAULT_MAX_TOKENS
    sampling = read_sampling(
        options,
        max_tokens=max_tokens,
        num_logprobs=options.logprobs,
        may_cut=options.max_tokens is None or limits.excess_max_tokens == "cut",
    )
    return ApiCall(
        CompletionRequest(
            request_id, options.model, prompts, sampling, answers_each, bool(options.echo)
        ),
        CompletionFormatter(has_logprobs=options.logprobs is not None),
        ResponseMeta(request_id, options.model, int(time.time()), answers_each, num_answers),
        stream=bool(options.stream),
        include_usage=wants_usage(options),
        continuous_usage=wants_continuous_usage(options),
        ignored=ignored,
    )


class TokenizeCall(NamedTuple):
    """A parsed call of `/tokenize`.

    Attributes:
        options: its checked fields.
        request: the request.
        ignored: the names of the fields that have no effect.
    """

    options: TokenizeBody
    request: TokenizeRequest
    ignored: tuple[str, ...]


def parse_tokenize(body: bytes, *, limits: LimitsConfig) -> TokenizeCall:
    """Check and parse the JSON body of `/tokenize`.

    Raises:
        RequestError: it is invalid.
    """
    options, ignored = check_body(load_json(body), TokenizeBody, limits)
    if (options.prompt is None) == (options.messages is None):
        raise RequestError(
            "send either a prompt or messages, and not both",
            param="prompt" if options.prompt is None else "messages",
        )
    if options.prompt is not None:
        check_unicode(options.prompt, "prompt")
        request = TokenizeRequest(options.prompt, options.add_special_tokens is not False)
        return TokenizeCall(options, request, ignored)
    if options.add_special_tokens:
        raise RequestError(
            "add_special_tokens is true, but the chat template decides that: leave it out",
            param="add_special_tokens",
        )
    messages = read_messages(options.messages or [], limits)
    chat = ChatRequest("tokenize", options.model or "", messages)
    is_open = options.add_generation_prompt is not False or bool(options.continue_final_message)
    request = TokenizeRequest(chat, add_generation_prompt=is_open)
    return TokenizeCall(options, request, ignored)


def parse_detokenize(body: bytes, *, limits: LimitsConfig) -> Checked[DetokenizeBody]:
    """Check the JSON body of `/detokenize`; raises `RequestError`."""
    return check_body(load_json(body), DetokenizeBody, limits)


def _read_prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str) or _is_token_ids(value):
        value, paths = [value], ["prompt"]
    elif isinstance(value, list):
        paths = [f"prompt[{i}]" for i in range(len(value))]
    else:
        raise RequestError(f"prompt is {kind_of(value)}: {_PROMPT_REMEDY}", param="prompt")
    if not value:
        raise RequestError(f"prompt is empty: {_PROMPT_REMEDY}", param="prompt")
    return tuple(_read_prompt(each, path) for each, path in zip(value, paths, strict=True))


def _read_prompt(value: Any, path: str) -> str | tuple[int, ...]:
    if isinstance(value, str):
        if not value:
            raise RequestError(f"{path} is empty: send some text", param=path)
        check_unicode(value, path)
        return value
    if not _is_token_ids(value):
        raise RequestError(f"{path} is {kind_of(value)}: {_PROMPT_REMEDY}", param=path)
    return tuple(value)


def _is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(id_) is int and 0 <= id_ <= LARGEST_TOKEN_ID for id_ in value)
    )
