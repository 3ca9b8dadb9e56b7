"""Parses requests of the OpenAI chat API: an untrusted JSON body -> `ChatRequest`, or an error.

`protocol.py` has the fields beside the messages, `completions.py` plain completions, and
`streaming.py` writes the responses.
Source: https://platform.openai.com/docs/api-reference/chat, and vLLM's extensions to it.

Rules for a conversation: system (or developer) messages come first; consecutive messages of one
role become one turn, joined by a line break; the last turn is the user's; only user messages have
images. `detail` is checked but has no effect: LLaVA encodes images in one way, that of training.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llava_ray.config import LimitsConfig
from llava_ray.errors import RequestError, UnsupportedError
from llava_ray.serve.fetch.url_policy import read_image_url
from llava_ray.serve.openai.call import ApiCall
from llava_ray.serve.openai.protocol import (
    ChatBody,
    check_options,
    read_num_answers,
    read_sampling,
    wants_usage,
)
from llava_ray.serve.openai.streaming import ChatFormatter, ResponseMeta
from llava_ray.serve.openai.validation import (
    check_unicode,
    is_one_of,
    kind_of,
    load_json,
    refuse_unknown,
    show,
)
from llava_ray.types import ChatRequest, ImagePart, Message, Role, TextPart

MAX_SCHEMA_CHARACTERS = 100_000
_ANY_OBJECT = {"type": "object"}

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
DETAILS = ("auto", "low", "high", "original", None)

_MESSAGE_FIELDS = {"role", "content", "name"}
ASSISTANT_FIELDS = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
}
_OTHER_PARTS = {
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
    "file": "files",
    "image_embeds": "embeddings",
}


def parse_chat(
    body: bytes | Mapping[str, Any], *, limits: LimitsConfig, request_id: str
) -> ApiCall:
    """Check and parse the JSON body of `/v1/chat/completions`.

    Raises:
        RequestError: it is invalid; `param` names the field, the message says what to do.
    """
    body = dict(body) if isinstance(body, Mapping) else load_json(body)
    options = check_options(body, ChatBody)
    messages = read_messages(options.messages, limits)
    sampling = read_sampling(
        options,
        max_tokens=_read_max_tokens(options),
        num_logprobs=_read_num_logprobs(options),
        json_schema=read_format(options.response_format),
    )
    num_answers = read_num_answers(options, limits)
    request = ChatRequest(request_id, options.model, messages, sampling, num_answers)
    return ApiCall(
        request,
        ChatFormatter(has_logprobs=sampling.num_logprobs is not None),
        ResponseMeta(request_id, options.model, int(time.time()), num_answers, num_answers),
        stream=bool(options.stream),
        include_usage=wants_usage(options),
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


def read_messages(values: list[Any], limits: LimitsConfig) -> tuple[Message, ...]:
    """Parse a conversation; raises `RequestError` for one that cannot be continued."""
    if len(values) > limits.max_messages:
        raise RequestError(
            f"{len(values)} messages, more than the {limits.max_messages} allowed: "
            "leave out the oldest",
            param="messages",
        )
    return _join_turns(_read_each(values, limits))


def _read_each(values: list[Any], limits: LimitsConfig) -> Iterator[Message]:
    if not values:
        raise RequestError("messages is empty: send at least one from the user", param="messages")
    num_images = 0
    role = "system"
    for number, value in enumerate(values):
        path = f"messages[{number}]"
        message = _read_message(value, path, limits)
        if message.role == "system" and role != "system":
            raise RequestError(
                "a system message follows another message: put it first", param=f"{path}.role"
            )
        role = message.role
        num_images += sum(isinstance(part, ImagePart) for part in message.parts)
        if num_images > limits.max_images:
            raise RequestError(
                f"more than the {limits.max_images} images allowed in a conversation: send fewer",
                param=f"{path}.content",
            )
        yield message
    if role != "user":
        raise RequestError(
            f"the last message is from the {role}: end with a user message to be answered",
            param=f"messages[{len(values) - 1}].role",
        )


def _read_message(value: Any, path: str, limits: LimitsConfig) -> Message:
    if not isinstance(value, dict):
        raise RequestError(
            f"{path} is {kind_of(value)}: "
            'send an object like {"role": "user", "content": "Hello"}',
            param=path,
        )
    role = value.get("role")
    if role in ("tool", "function"):
        raise UnsupportedError(
            f"role {role!r} is not supported by this server: put the result in a user message",
            param=f"{path}.role",
        )
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(
            f"{path}.role is {show(role) if 'role' in value else 'missing'}: "
            f"use one of {', '.join(ROLES)}",
            param=f"{path}.role",
        )
    known = _MESSAGE_FIELDS | (ASSISTANT_FIELDS.keys() if role == "assistant" else set())
    refuse_unknown(value, known, path)
    for name, neutral in ASSISTANT_FIELDS.items():
        if name in value and not is_one_of(value[name], neutral):
            raise UnsupportedError(
                f"{path}.{name} is not supported by this server: leave it out",
                param=f"{path}.{name}",
            )
    if value.get("name") is not None and not isinstance(value["name"], str):
        raise RequestError(
            f"{path}.name is {kind_of(value['name'])}: send a string", param=f"{path}.name"
        )
    parts = tuple(_read_content(value.get("content"), ROLES[role], f"{path}.content", limits))
    return Message(ROLES[role], parts)


def _read_content(
    value: Any, role: Role, path: str, limits: LimitsConfig
) -> Iterator[TextPart | ImagePart]:
    if isinstance(value, str):
        value = [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise RequestError(
            f"{path} is {kind_of(value)}: send a string, or a list of text and image_url parts",
            param=path,
        )
    is_empty = True
    for number, item in enumerate(value):
        part = _read_part(item, role, f"{path}[{number}]", limits)
        is_empty = is_empty and isinstance(part, TextPart) and not part.text.strip()
        yield part
    if is_empty and (role == "user" or not value):  # the assistant's answer may have been empty
        raise RequestError("the message is empty: add text or an image", param=path)


def _read_part(value: Any, role: Role, path: str, limits: LimitsConfig) -> TextPart | ImagePart:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        refuse_unknown(value, {"type", "text"}, path)
        text = value.get("text")
        if not isinstance(text, str):
            raise RequestError(
                f"{path}.text is {kind_of(text)}: send a string", param=f"{path}.text"
            )
        check_unicode(text, f"{path}.text")
        return TextPart(text)
    if kind == "image_url":
        if role != "user":
            raise RequestError(
                f"an image in a message of the {role}: images go into user messages", param=path
            )
        return _read_image(value, path, limits)
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise UnsupportedError(
            f"{_OTHER_PARTS[kind]} in messages: this server takes text and image_url parts",
            param=f"{path}.type",
        )
    if not isinstance(value, dict):
        raise RequestError(
            f'{path} is {kind_of(value)}: send a part like {{"type": "text", "text": "Hello"}}',
            param=path,
        )
    raise RequestError(f"{path}.type is {show(kind)}: use text or image_url", param=f"{path}.type")


def _read_image(part: dict[str, Any], path: str, limits: LimitsConfig) -> ImagePart:
    refuse_unknown(part, {"type", "image_url", "uuid", "detail"}, path)
    image, path = part.get("image_url"), f"{path}.image_url"
    detail = part.get("detail")
    if isinstance(image, dict):
        refuse_unknown(image, {"url", "detail"}, path)
        detail = image.get("detail", detail)
        image, path = image.get("url"), f"{path}.url"
    if not isinstance(detail, str | None) or detail not in DETAILS:
        raise RequestError(
            f"detail is {show(detail)}: use auto, low, high or original",
            param=f"{path.removesuffix('.url')}.detail",
        )
    if not isinstance(image, str):
        raise RequestError(
            f'{path} is {kind_of(image)}: send {{"url": "data:image/png;base64,..."}}', param=path
        )
    return read_image_url(image, limits=limits, param=path)


def read_format(value: dict[str, Any] | None) -> str | None:
    """Return the JSON schema that a response format asks for, as text; None: plain text.

    The model's replica decides whether it supports the schema.

    Raises:
        RequestError: it is none of the three formats, or the schema is invalid.
    """
    if value is None:
        return None
    match value.get("type"):
        case "text":
            refuse_unknown(value, {"type"}, "response_format")
            return None
        case "json_object":
            refuse_unknown(value, {"type"}, "response_format")
            return json.dumps(_ANY_OBJECT)
        case "json_schema":
            refuse_unknown(value, {"type", "json_schema"}, "response_format")
            return _read_schema(value.get("json_schema"), "response_format.json_schema")
    raise RequestError(
        f"response_format.type is {show(value.get('type'))}: use text, json_object or json_schema",
        param="response_format.type",
    )


def _read_schema(value: Any, path: str) -> str:
    if not isinstance(value, dict):
        raise RequestError(
            f'{path} is {kind_of(value)}: send {{"name": "answer", "schema": {{...}}}}', param=path
        )
    refuse_unknown(value, {"name", "description", "schema", "strict"}, path)
    for name, kind in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(value.get(name), kind | None):
            raise RequestError(
                f"{path}.{name} is {kind_of(value[name])}: "
                f"{'true or false' if kind is bool else 'a string'}",
                param=f"{path}.{name}",
            )
    schema = value.get("schema")
    if not isinstance(schema, dict):
        raise RequestError(
            f"{path}.schema is {kind_of(schema)}: send a JSON schema, which is an object",
            param=f"{path}.schema",
        )
    text = json.dumps(schema, ensure_ascii=False)
    check_unicode(text, f"{path}.schema")
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise RequestError(
            f"the schema has {len(text):,} characters, more than the {MAX_SCHEMA_CHARACTERS:,} "
            "allowed: shorten it",
            param=f"{path}.schema",
        )
    return text


def _join_turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Join consecutive messages of one role; few chat templates accept two in a row."""
    turns: list[Message] = []
    for message in messages:
        if turns and turns[-1].role == message.role:
            joined = (*turns[-1].parts, TextPart("\n"), *message.parts)
            turns[-1] = Message(message.role, joined)
        else:
            turns.append(message)
    return tuple(turns)
