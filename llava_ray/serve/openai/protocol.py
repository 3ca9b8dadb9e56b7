"""The fields of requests to the OpenAI API that are used, and their bounds.

`messages.py` reads messages, `completions.py` prompts; `fields.py` has the fields that are not
used.
Sources: https://platform.openai.com/docs/api-reference/chat, and vLLM's extensions to it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.types import StringConstraints

from llava_ray.config import LimitsConfig
from llava_ray.errors import RequestError, UnsupportedError
from llava_ray.serve.openai.fields import CHAT_RULES, COMPLETION_RULES, TOKENIZE_RULES, Rule
from llava_ray.serve.openai.validation import describe_unknown, is_one_of, show, to_request_error

MAX_TOP_LOGPROBS = 20
LARGEST_TOKEN_ID = 2**31 - 1


class StreamOptions(BaseModel):
    """What a stream tells besides the answer.

    Attributes:
        include_usage: it ends with the token counts.
        include_obfuscation: no effect; events are not padded.
        continuous_usage_stats: every event has the token counts so far (vLLM's extension).
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = Field(None, description="true or false")
    include_obfuscation: bool | None = Field(None, description="true or false")
    continuous_usage_stats: bool | None = Field(None, description="true or false")


def _to_integer(value: Any) -> Any:
    """Return 7 for 7.0, which JavaScript and YAML do not tell apart; other values unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _to_list(value: Any) -> Any:
    """Return one text as a list; other values unchanged."""
    return [value] if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(_to_integer)]
_StopText = Annotated[str, StringConstraints(max_length=1000)]
_TokenId = Annotated[Integer, Field(ge=0, le=LARGEST_TOKEN_ID)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class OpenBody(BaseModel):
    """A body in which `check_body` has looked for fields that are not used.

    Each description of a field is also the advice in an error message.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    rules: ClassVar[Mapping[str, Rule]]


class SamplingBody(OpenBody):
    """The fields that chats and plain completions share."""

    model: str = Field(max_length=500, description="a name that /v1/models lists")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description='an object like {"include_usage": true}'
    )
    max_tokens: Integer | None = Field(
        None, ge=1, lt=2**63, description="an integer of at least 1, or leave it out"
    )
    min_tokens: Integer | None = Field(
        None, ge=0, le=2**31, description="an integer from 0 to max_tokens"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(
        None, ge=0, le=1, description="a number from 0 to 1; 0 takes the likeliest token"
    )
    top_k: Integer | None = Field(
        None, ge=-1, le=2**31, description="an integer; 0 or -1 means all tokens"
    )
    min_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="a number from 0.01 to 100; 1 has no effect"
    )
    logit_bias: dict[str, _Bias] | None = Field(
        None,
        max_length=1024,
        description='an object like {"42": -5}: token ids, and numbers from -100 to 100',
    )
    stop: Annotated[list[_StopText | None] | None, BeforeValidator(_to_list)] = Field(
        None, max_length=16, description="a string, or a list of at most 16"
    )
    stop_token_ids: list[_TokenId] | None = Field(
        None, max_length=128, description="a list of at most 128 token ids"
    )
    seed: Integer | None = Field(
        None, ge=-(2**63), lt=2**63, description="an integer of at most 64 bits"
    )
    ignore_eos: bool | None = Field(None, description="true or false")
    n: Integer | None = Field(None, ge=1, le=128, description="an integer from 1 to 128")
    best_of: Integer | None = Field(None, ge=1, description="the same number as n, or leave it out")


class ChatBody(SamplingBody):
    """The fields of a chat."""

    rules = CHAT_RULES

    messages: list[Any] = Field(
        description='send a list like [{"role": "user", "content": "Hello"}]'
    )
    max_completion_tokens: Integer | None = Field(
        None, ge=1, lt=2**63, description="an integer of at least 1, or leave it out"
    )
    logprobs: bool | None = Field(None, description="true or false")
    response_format: dict[str, Any] | None = Field(
        None,
        description='{"type": "json_object"}, {"type": "text"}, or '
        '{"type": "json_schema", "json_schema": {"name": "answer", "schema": {...}}}',
    )
    top_logprobs: Integer | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="an integer from 0 to 20"
    )
    add_generation_prompt: bool | None = Field(
        None, description="false only where the last message is to be continued"
    )
    continue_final_message: bool | None = Field(
        None, description="true or false; a last message of the assistant is always continued"
    )


class CompletionBody(SamplingBody):
    """The fields of a plain completion."""

    rules = COMPLETION_RULES

    prompt: Any = Field(description="send a string, a list of strings, or a list of token ids")
    logprobs: Integer | None = Field(None, ge=0, le=5, description="an integer from 0 to 5")
    echo: bool | None = Field(None, description="true or false")


class TokenizeBody(OpenBody):
    """The fields of `/tokenize`, as in vLLM."""

    rules = TOKENIZE_RULES

    model: str | None = Field(None, max_length=500, description="a name that /v1/models lists")
    prompt: str | None = Field(None, description="a string")
    messages: list[Any] | None = Field(None, description="a list, as in a chat")
    add_special_tokens: bool | None = Field(None, description="true or false")
    add_generation_prompt: bool | None = Field(None, description="true or false")
    continue_final_message: bool | None = Field(None, description="true or false")
    return_token_strs: bool | None = Field(None, description="true or false")


class DetokenizeBody(OpenBody):
    """The fields of `/detokenize`, as in vLLM."""

    rules = TOKENIZE_RULES

    model: str | None = Field(None, max_length=500, description="a name that /v1/models lists")
    tokens: list[_TokenId] = Field(  # a million errors would take seconds to collect
        fail_fast=True, description="a list of token ids"
    )


Body = TypeVar("Body", bound=OpenBody)
Options = TypeVar("Options", bound=SamplingBody)


class Checked(NamedTuple, Generic[Body]):
    """The checked fields of a body.

    Attributes:
        options: the fields that are used; messages and prompts are not checked here.
        ignored: the names of the fields that were sent and have no effect.
    """

    options: Body
    ignored: tuple[str, ...]


def check_body(body: dict[str, Any], kind: type[Body], limits: LimitsConfig) -> Checked[Body]:
    """Return the checked fields of a request.

    Raises:
        RequestError: a field is missing, out of bounds, or unknown where unknown ones are refused.
        UnsupportedError: a field asks for something that is not supported.
    """
    own = kind.model_fields
    ignored = []
    for name, value in body.items():
        if name in own or value is None:
            continue
        rule = kind.rules.get(name)
        if rule is None and limits.unknown_fields == "refuse":
            raise describe_unknown(name, own)
        if rule is None or rule.is_passed_over or _has_no_tools(name, body):
            ignored.append(name)
        elif not is_one_of(value, rule.neutral or ()):
            raise UnsupportedError(
                f"{name}={show(value)} is not supported by this server: {rule.note}", param=name
            )
    try:
        options = kind(**{name: body[name] for name in own if name in body})
    except ValidationError as error:
        raise to_request_error(error, kind) from None
    return Checked(options, tuple(ignored))


def check_options(
    body: dict[str, Any], kind: type[Options], limits: LimitsConfig
) -> Checked[Options]:
    """Return the checked fields of a request for an answer; see `check_body`."""
    checked = check_body(body, kind, limits)
    if wants_usage(checked.options) and not checked.options.stream:
        raise RequestError(
            "stream_options is set, but stream is not: set stream to true or leave it out",
            param="stream_options",
        )
    return checked


def _has_no_tools(name: str, body: Mapping[str, Any]) -> bool:
    """Whether a field lists tools that the request itself says not to call."""
    choice = {"tools": "tool_choice", "functions": "function_call"}.get(name)
    return choice is not None and body.get(choice) == "none"


def wants_continuous_usage(options: SamplingBody) -> bool:
    """Whether every event of a stream has the token counts so far."""
    return wants_usage(options) and bool(
        options.stream_options and options.stream_options.continuous_usage_stats
    )


def wants_usage(options: SamplingBody) -> bool:
    """Whether a stream ends with the token counts."""
    return bool(options.stream_options and options.stream_options.include_usage)
