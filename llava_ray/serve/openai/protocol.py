"""The fields of requests to the OpenAI API and their bounds, except messages and prompts.

Sources: https://platform.openai.com/docs/api-reference/chat, and vLLM's extensions to it.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from llava_ray.config import LimitsConfig
from llava_ray.errors import RequestError, UnsupportedError
from llava_ray.serve.openai.validation import is_one_of, refuse_unknown, show, to_request_error
from llava_ray.types import Sampling

MAX_TOP_LOGPROBS = 20
LARGEST_TOKEN_ID = 2**31 - 1

# Fields that are not supported: name -> (accepted neutral values, what to do instead).
_LEAVE_OUT = "leave it out"
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "leave it out and describe the task in the prompt"),
    "tool_choice": (("none", "auto"), _LEAVE_OUT),
    "functions": (([],), "leave it out and describe the task in the prompt"),
    "function_call": (("none", "auto"), _LEAVE_OUT),
    "audio": ((), "ask for text"),
    "modalities": ((["text"],), 'send ["text"]'),
    "reasoning_effort": (("none",), _LEAVE_OUT),
    "verbosity": (("medium",), "ask for a short or long answer in the prompt"),
    "web_search_options": ((), _LEAVE_OUT),
    "prediction": ((), _LEAVE_OUT),
    "include_stop_str_in_output": ((False,), _LEAVE_OUT),
    "echo": ((False,), _LEAVE_OUT),
    "response_format": (({"type": "text"},), "use /v1/chat/completions"),
    "suffix": (("",), "the models here cannot fill in text before a suffix: leave it out"),
    "add_generation_prompt": ((True,), _LEAVE_OUT),
    "continue_final_message": ((False,), _LEAVE_OUT),
    "chat_template": ((), "the template comes with the model; leave it out"),
    "chat_template_kwargs": (({},), _LEAVE_OUT),
    "mm_processor_kwargs": (({},), _LEAVE_OUT),
}
# Accepted fields without an effect: they describe the caller or the service, not the answer.
WITHOUT_EFFECT = {
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
_TokenId = Annotated[int, Field(ge=0, le=LARGEST_TOKEN_ID)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingBody(BaseModel):
    """The fields that chats and plain completions share.

    Each description is also the advice in an error message.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(max_length=500, description="a name that /v1/models lists")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description='an object like {"include_usage": true}'
    )
    max_tokens: int | None = Field(
        None, ge=1, le=2**31, description="an integer of at least 1, or leave it out"
    )
    min_tokens: int | None = Field(
        None, ge=0, le=2**31, description="an integer from 0 to max_tokens"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(
        None, gt=0, le=1, description="a number greater than 0 and at most 1"
    )
    top_k: int | None = Field(
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
    stop: list[_StopText] | None = Field(
        None, max_length=16, description="a non-empty string, or a list of at most 16"
    )
    stop_token_ids: list[_TokenId] | None = Field(
        None, max_length=128, description="a list of at most 128 token ids"
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="an integer of at most 64 bits"
    )
    ignore_eos: bool | None = Field(None, description="true or false")
    n: int | None = Field(None, ge=1, le=128, description="an integer from 1 to 128")
    best_of: int | None = Field(None, ge=1, description="the same number as n, or leave it out")


class ChatBody(SamplingBody):
    """The supported fields of a chat."""

    messages: list[Any] = Field(
        description='send a list like [{"role": "user", "content": "Hello"}]'
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31, description="an integer of at least 1, or leave it out"
    )
    logprobs: bool | None = Field(None, description="true or false")
    response_format: dict[str, Any] | None = Field(
        None,
        description='{"type": "json_object"}, {"type": "text"}, or '
        '{"type": "json_schema", "json_schema": {"name": "answer", "schema": {...}}}',
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="an integer from 0 to 20"
    )


class CompletionBody(SamplingBody):
    """The supported fields of a plain completion."""

    prompt: Any = Field(description="send a string, a list of strings, or a list of token ids")
    logprobs: int | None = Field(None, ge=0, le=5, description="an integer from 0 to 5")
    echo: bool | None = Field(None, description="true or false")


class TokenizeBody(BaseModel):
    """The fields of `/tokenize`, as in vLLM."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, max_length=500, description="a name that /v1/models lists")
    prompt: str | None = Field(None, description="a string")
    messages: list[Any] | None = Field(None, description="a list, as in a chat")
    add_special_tokens: bool | None = Field(None, description="true or false")
    add_generation_prompt: bool | None = Field(None, description="true or false")
    return_token_strs: bool | None = Field(None, description="true or false")


class DetokenizeBody(BaseModel):
    """The fields of `/detokenize`, as in vLLM."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, max_length=500, description="a name that /v1/models lists")
    tokens: list[_TokenId] = Field(description="a list of token ids")


Body = TypeVar("Body", bound=SamplingBody)


def check_options(body: dict[str, Any], kind: type[Body]) -> Body:
    """Return the checked fields of a request; messages are not checked here.

    Raises:
        RequestError: a field is unknown, missing or out of bounds.
        UnsupportedError: a field asks for something that is not supported.
    """
    own = kind.model_fields
    refuse_unknown(body, {*own, *UNSUPPORTED, *WITHOUT_EFFECT}, "")
    for name, (neutral, remedy) in UNSUPPORTED.items():
        if name in body and name not in own and not is_one_of(body[name], neutral):
            raise UnsupportedError(
                f"{name}={show(body[name])} is not supported by this server: {remedy}", param=name
            )
    if isinstance(body.get("stop"), str):
        body = {**body, "stop": [body["stop"]] if body["stop"] else None}
    try:
        options = kind(**{name: body[name] for name in own if name in body})
    except ValidationError as error:
        raise to_request_error(error, kind) from None
    if options.stream_options and not options.stream:
        raise RequestError(
            "stream_options is set, but stream is not: set stream to true or leave it out",
            param="stream_options",
        )
    return options


def wants_usage(options: SamplingBody) -> bool:
    """Whether a stream ends with the token counts."""
    return bool(options.stream_options and options.stream_options.include_usage)


def read_num_answers(options: SamplingBody, limits: LimitsConfig) -> int:
    """Return the number of answers to each prompt.

    Raises:
        RequestError: `n` is above the limit.
        UnsupportedError: `best_of` differs from `n`.
    """
    num_answers = options.n or 1
    if num_answers > limits.max_answers:
        raise RequestError(
            f"n={num_answers} is more than the {limits.max_answers} answers allowed: ask for fewer",
            param="n",
        )
    if options.best_of not in (None, num_answers):
        raise UnsupportedError(
            f"best_of={options.best_of} is not supported by this server: "
            f"leave it out or send n, which is {num_answers}",
            param="best_of",
        )
    return num_answers


def read_sampling(
    options: SamplingBody,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    json_schema: str | None = None,
) -> Sampling:
    """Return how the answer is to be generated, with OpenAI's defaults.

    Raises:
        RequestError: the fields contradict each other.
    """
    if max_tokens is not None and (options.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens={options.min_tokens} is more than the {max_tokens} of max_tokens: "
            "ask for fewer",
            param="min_tokens",
        )
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if options.temperature is None else options.temperature,
        top_p=1.0 if options.top_p is None else options.top_p,
        stop=tuple(options.stop or ()),
        seed=options.seed,
        ignore_eos=bool(options.ignore_eos),
        top_k=max(options.top_k or 0, 0),
        min_p=options.min_p or 0.0,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        repetition_penalty=options.repetition_penalty or 1.0,
        logit_bias=_read_biases(options.logit_bias or {}),
        min_tokens=options.min_tokens or 0,
        stop_token_ids=tuple(options.stop_token_ids or ()),
        num_logprobs=num_logprobs,
        json_schema=json_schema,
    )


def _read_biases(values: dict[str, float]) -> tuple[tuple[int, float], ...]:
    biases = {}
    for name, bias in values.items():
        if not (name.isascii() and name.isdigit() and len(name) < 11):
            raise RequestError(
                f"logit_bias has the key {show(name)}: use token ids as keys, like "
                '"42"; /tokenize returns them',
                param="logit_bias",
            )
        biases[int(name)] = bias
    return tuple(biases.items())
