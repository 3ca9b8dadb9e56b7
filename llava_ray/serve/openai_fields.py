"""The fields of a request to the OpenAI chat API beside its messages, and what each may be.

Sources: https://platform.openai.com/docs/api-reference/chat, and vLLM's extensions to it.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from llava_ray.errors import RequestError, UnsupportedError

# Fields that change the answer, which we cannot do; the values that ask for nothing; the remedy.
_LEAVE_OUT = "leave it out"
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "leave it out and describe the task in the prompt"),
    "tool_choice": (("none", "auto"), _LEAVE_OUT),
    "functions": (([],), "leave it out and describe the task in the prompt"),
    "function_call": (("none", "auto"), _LEAVE_OUT),
    "response_format": (({"type": "text"},), "ask for the format in the prompt, and check it"),
    "logprobs": ((False,), _LEAVE_OUT),
    "top_logprobs": ((0,), _LEAVE_OUT),
    "n": ((1,), "send the request n times, with a seed each"),
    "best_of": ((1,), _LEAVE_OUT),
    "presence_penalty": ((0,), "leave it out or send 0"),
    "frequency_penalty": ((0,), "leave it out or send 0"),
    "repetition_penalty": ((1,), "leave it out or send 1"),
    "logit_bias": (({},), _LEAVE_OUT),
    "audio": ((), "ask for text"),
    "modalities": ((["text"],), 'send ["text"]'),
    "reasoning_effort": (("none",), _LEAVE_OUT),
    "verbosity": (("medium",), "ask for a short or long answer in the prompt"),
    "web_search_options": ((), _LEAVE_OUT),
    "prediction": ((), _LEAVE_OUT),
    "top_k": ((-1, 0), "use top_p"),
    "min_p": ((0,), "use top_p"),
    "min_tokens": ((0,), "use ignore_eos with max_tokens"),
    "stop_token_ids": (([],), "use stop"),
    "include_stop_str_in_output": ((False,), _LEAVE_OUT),
    "echo": ((False,), _LEAVE_OUT),
    "add_generation_prompt": ((True,), _LEAVE_OUT),
    "continue_final_message": ((False,), _LEAVE_OUT),
    "chat_template": ((), "the template comes with the model; leave it out"),
    "chat_template_kwargs": (({},), _LEAVE_OUT),
    "mm_processor_kwargs": (({},), _LEAVE_OUT),
}
# Fields that say something about the caller or the service and nothing about the answer.
_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "priority",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(None, description="true or false")
    include_obfuscation: bool | None = Field(None, description="true or false")
    continuous_usage_stats: Literal[False] | None = Field(None, description="leave it out")


_StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class ChatBody(BaseModel):
    """The fields of a request that have an effect; each description is the remedy in an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(max_length=500, description="name one of those that /v1/models lists")
    messages: list[Any] = Field(
        description='send a list like [{"role": "user", "content": "Hello"}]'
    )
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description='an object like {"include_usage": true}'
    )
    max_tokens: int | None = Field(
        None, ge=1, le=2**31, description="a whole number from 1, or leave it out"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31, description="a whole number from 1, or leave it out"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, gt=0, le=1, description="a number over 0, at most 1")
    stop: list[_StopText] | None = Field(
        None, max_length=16, description="a text that is not empty, or a list of at most 16"
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="a whole number of at most 64 bits"
    )
    ignore_eos: bool | None = Field(None, description="true or false")


def check_options(body: dict[str, Any]) -> ChatBody:
    """Return the checked fields of a request; `messages` stays as it came.

    Raises:
        RequestError: a field is unknown, missing or out of its bounds.
        UnsupportedError: a field asks for what this server cannot do.
    """
    known = {*ChatBody.model_fields, *_UNSUPPORTED, *_WITHOUT_EFFECT}
    refuse_unknown(body, known, "")
    for name, (neutral, remedy) in _UNSUPPORTED.items():
        if name in body and not is_one_of(body[name], neutral):
            raise UnsupportedError(
                f"{name}={show(body[name])} is not supported by this server: {remedy}", param=name
            )
    if isinstance(body.get("stop"), str):
        body = {**body, "stop": [body["stop"]] if body["stop"] else None}
    try:
        options = ChatBody(**{name: body[name] for name in ChatBody.model_fields if name in body})
    except ValidationError as error:
        raise _explain(error) from None
    if options.stream_options and not options.stream:
        raise RequestError(
            "stream_options is set, but stream is not: set stream to true or leave it out",
            param="stream_options",
        )
    limit, older = options.max_completion_tokens, options.max_tokens
    if limit is not None and older is not None and limit != older:
        raise RequestError(
            f"max_tokens={older} and max_completion_tokens={limit} disagree: send one of them",
            param="max_completion_tokens",
        )
    return options


def _explain(error: ValidationError) -> RequestError:
    detail = error.errors(include_url=False)[0]
    path = _path(detail["loc"])
    field = ChatBody.model_fields[str(detail["loc"][0])]
    if detail["type"] == "missing":
        return RequestError(f"{path} is missing: {field.description}", param=path)
    if detail["type"] == "extra_forbidden":
        return _unknown(str(detail["loc"][-1]), StreamOptions.model_fields, path)
    problem = detail["msg"][0].lower() + detail["msg"][1:]
    return RequestError(
        f"{path}={show(detail['input'])}: {problem}; {field.description}", param=path
    )


def refuse_unknown(value: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    """Raise a `RequestError` with "did you mean" for the first field that is not known."""
    known = set(known)
    for name in value:
        if name not in known:
            raise _unknown(name, known, f"{path}.{name[:100]}" if path else name[:100])


def _unknown(name: str, known: Iterable[str], path: str) -> RequestError:
    close = difflib.get_close_matches(name[:100], sorted(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "leave it out"
    return RequestError(f"unknown field {show(name)}: {hint}", param=path)


def is_one_of(value: Any, neutral: Iterable[Any]) -> bool:
    """Whether a value is null or neutral; true is not 1 here, unlike in Python."""
    return value is None or any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral
    )


def check_unicode(text: str, path: str) -> None:
    """Raise a `RequestError` for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start} is half of a surrogate pair: send valid Unicode", param=path
        ) from None


def _path(places: Iterable[int | str]) -> str:
    return "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in places).removeprefix(".")


def kind_of(value: Any) -> str:
    """Say in JSON's terms what a value is instead of what was expected."""
    if value is None:
        return "missing or null"
    kinds = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def show(value: Any) -> str:
    """Return a value as short JSON, for an error message."""
    if isinstance(value, str):
        value = value[:100]
    try:
        text = json.dumps(value, default=repr)
    except RecursionError:
        return kind_of(value)
    return text if len(text) <= 60 else text[:57] + "..."
