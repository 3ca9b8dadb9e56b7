"""What happens to the fields of requests that change nothing in an answer: the one table of them.

`protocol.py` has the fields that are used. Every other field is in one of three groups:

    neutral       some values ask for nothing and pass; any other value asks for something that
                  this server does not do, and is refused with what to do instead
    passed over   any value passes without effect; the header `x-llava-ray-ignored` names the field
    unknown       not in the table: passed over too, or refused, as `limits.unknown_fields` says

Null passes everywhere. The parser, the OpenAPI document, the page docs/reference/request-fields.md
and the tests all read this table.
Sources: OpenAI's API reference (openai-python 3.57); vLLM's and SGLang's protocols.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

IGNORED_HEADER = "x-llava-ray-ignored"
"""Header of a response: the fields of the request that had no effect, separated by commas."""

_MAX_NAMES, _MAX_NAME_LENGTH = 32, 60


class Rule(NamedTuple):
    """What happens to a field that is not used.

    Attributes:
        neutral: the values that ask for nothing, besides null; None: any value is passed over.
        note: what to do instead of sending another value; or why the field has no effect.
    """

    neutral: tuple[Any, ...] | None
    note: str

    @property
    def is_passed_over(self) -> bool:
        """Whether any value passes."""
        return self.neutral is None


def _take(*neutral: Any, otherwise: str = "leave it out") -> Rule:
    return Rule(neutral, otherwise)


def _pass_over(reason: str) -> Rule:
    return Rule(None, reason)


_CALLER = "it describes the caller or the request, not the answer"
_CACHE = "prompts are cached without it"
_REASONING = "the models here write no separate reasoning"
_FORMAT = "use response_format with a JSON schema"
_TASK = "leave it out and describe the task in the prompt"
_ORDER = "requests are answered in the order of their arrival: leave it out"

_COMMON: dict[str, Rule] = {
    # OpenAI
    "metadata": _pass_over(_CALLER),
    "moderation": _pass_over("the operator of this server configures moderation"),
    "prediction": _pass_over("it would only speed up the answer"),
    "prompt_cache_key": _pass_over(_CACHE),
    "prompt_cache_options": _pass_over(_CACHE),
    "prompt_cache_retention": _pass_over(_CACHE),
    "reasoning_effort": _pass_over(_REASONING),
    "safety_identifier": _pass_over(_CALLER),
    "service_tier": _take("auto", "default", otherwise=_ORDER),
    "store": _pass_over("answers are not stored"),
    "user": _pass_over(_CALLER),
    "verbosity": _pass_over("ask for a short or a long answer in the prompt"),
    # vLLM
    "allowed_token_ids": _take(otherwise="use logit_bias or response_format"),
    "bad_words": _take([], otherwise="use logit_bias with the token ids from /tokenize"),
    "cache_salt": _take(),
    "detokenize": _take(True),
    "early_stopping": _take(False),
    "guided_choice": _take(otherwise=_FORMAT),
    "guided_decoding_backend": _pass_over("this server chooses it"),
    "guided_grammar": _take(otherwise=_FORMAT),
    "guided_json": _take(otherwise=_FORMAT),
    "guided_regex": _take(otherwise=_FORMAT),
    "guided_whitespace_pattern": _pass_over("it changes nothing without guided decoding"),
    "include_stop_str_in_output": _take(False),
    "kv_transfer_params": _take({}),
    "length_penalty": _take(1.0, otherwise="there is no beam search here: leave it out"),
    "logits_processors": _take([]),
    "priority": _take(0, otherwise=_ORDER),
    "prompt_logprobs": _take(),
    "repetition_detection": _take(),
    "request_id": _pass_over("send the header x-request-id"),
    "return_token_ids": _take(False),
    "return_tokens_as_token_ids": _take(False),
    "skip_special_tokens": _take(True),
    "spaces_between_special_tokens": _pass_over("answers have no special tokens"),
    "structural_tag": _take(otherwise=_FORMAT),
    "structured_outputs": _take({}, otherwise=_FORMAT),
    "truncate_prompt_tokens": _take(otherwise="shorten the prompt"),
    "use_beam_search": _take(False),
    "vllm_xargs": _take({}),
    # SGLang
    "custom_logit_processor": _take(),
    "custom_params": _take({}),
    "ebnf": _take(otherwise=_FORMAT),
    "lora_path": _take(otherwise="name the adapter in model, as NAME:ADAPTER"),
    "no_stop_trim": _take(False),
    "regex": _take(otherwise=_FORMAT),
    "return_hidden_states": _take(False),
    "rid": _pass_over("send the header x-request-id"),
    "session_params": _take({}),
}

_CHAT: dict[str, Rule] = {
    # OpenAI
    "audio": _take(otherwise="ask for text"),
    "function_call": _take("none", "auto"),
    "functions": _take([], otherwise=_TASK),
    "modalities": _take(["text"], otherwise='send ["text"]'),
    "parallel_tool_calls": _pass_over("there are no tools"),
    "tool_choice": _take("none", "auto"),
    "tools": _take([], otherwise=_TASK),
    "web_search_options": _take(),
    # vLLM
    "add_special_tokens": _take(False, otherwise="the chat template decides that: leave it out"),
    "chat_template": _take("", otherwise="the template comes with the model: leave it out"),
    "chat_template_kwargs": _take(
        {},
        {"enable_thinking": False},
        {"thinking": False},
        otherwise="the template comes with the model: leave it out",
    ),
    "documents": _take([], otherwise="put their text into a message"),
    "echo": _take(False),
    "include_reasoning": _pass_over(_REASONING),
    "media_io_kwargs": _take({}),
    "mm_processor_kwargs": _take({}, otherwise="images are encoded as in training: leave it out"),
    "thinking_token_budget": _pass_over(_REASONING),
    # SGLang
    "separate_reasoning": _pass_over(_REASONING),
    "stream_reasoning": _pass_over(_REASONING),
}

CHAT_RULES: Mapping[str, Rule] = MappingProxyType(dict(sorted((_COMMON | _CHAT).items())))
"""The fields of `/v1/chat/completions` that are not used."""

COMPLETION_RULES: Mapping[str, Rule] = MappingProxyType(
    dict(
        sorted(
            (
                _COMMON
                | {
                    "add_special_tokens": _take(True, otherwise="send token ids as the prompt"),
                    "response_format": _take(
                        {"type": "text"}, otherwise="use /v1/chat/completions"
                    ),
                    "suffix": _take(
                        "", otherwise="the models here cannot write what precedes a suffix"
                    ),
                }
            ).items()
        )
    )
)
"""The fields of `/v1/completions` that are not used."""

TOKENIZE_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        name: _CHAT[name]
        for name in (
            *("chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs"),
            "tools",
        )
    }
)
"""The fields of `/tokenize` and `/detokenize` that are not used."""


def write_ignored(names: Iterable[str]) -> str:
    """Return the value of the header `IGNORED_HEADER`; field names are untrusted."""
    return ", ".join(
        name[:_MAX_NAME_LENGTH].encode("unicode_escape").decode()
        for _, name in zip(range(_MAX_NAMES), names, strict=False)
    )
