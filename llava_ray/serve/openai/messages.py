"""The field `messages`: a list of untrusted JSON -> the turns of a conversation.

Reads the messages of every client: what has no meaning here is passed over (fields such as `id` or
`cache_control`, reasoning of earlier answers), tool calls and their results become text, and
`turns.py` puts the result into the form that every chat template takes. `detail` is checked but has
no effect: LLaVA encodes images in one way, that of training.
"""

import json
from collections.abc import Iterator
from typing import Any

from llava_ray.config import LimitsConfig
from llava_ray.errors import RequestError, UnsupportedError
from llava_ray.serve.fetch.url_policy import read_image_url
from llava_ray.serve.openai.turns import arrange_turns, is_blank
from llava_ray.serve.openai.validation import check_unicode, kind_of, show
from llava_ray.types import ImagePart, Message, Role, TextPart

Part = TextPart | ImagePart

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
"""Roles in requests, and whose turn each belongs to; a tool's result is told by the user."""

TOOL_ROLES = ("tool", "function")
DETAILS = ("auto", "low", "high", "original", "", None)

TEXT_FIELDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the field in which each has it."""
IMAGE_TYPES = ("image_url", "input_image")
PASSED_OVER_TYPES = ("reasoning", "reasoning_text", "redacted_thinking", "thinking")
"""Types of parts with an earlier answer's reasoning; models do not see that again."""
_OTHER_TYPES = {
    "audio_url": "audio",
    "file": "files",
    "image_embeds": "embeddings",
    "input_audio": "audio",
    "input_file": "files",
    "video": "video",
    "video_url": "video",
}


def read_messages(values: list[Any], limits: LimitsConfig) -> tuple[Message, ...]:
    """Return the turns of a conversation; the last one is to be answered, or continued.

    Raises:
        RequestError: a message is invalid, there are too many messages or images, or there is
            nothing to answer.
    """
    if len(values) > limits.max_messages:
        raise RequestError(
            f"{len(values)} messages, more than the {limits.max_messages} allowed: "
            "leave out the oldest",
            param="messages",
        )
    if not values:
        raise RequestError("messages is empty: send at least one from the user", param="messages")
    turns = arrange_turns(list(_read_each(values, limits)))
    if not turns or is_blank(turns[-1].parts):
        last = f"messages[{len(values) - 1}]"
        raise RequestError(
            f"{last} is empty, so there is nothing to answer: add text or an image",
            param=f"{last}.content",
        )
    return turns


def _read_each(values: list[Any], limits: LimitsConfig) -> Iterator[Message]:
    num_images = 0
    tools: dict[str, str] = {}
    for number, value in enumerate(values):
        message = _read_message(value, f"messages[{number}]", limits, tools)
        num_images += sum(isinstance(part, ImagePart) for part in message.parts)
        if num_images > limits.max_images:
            raise RequestError(
                f"more than the {limits.max_images} images allowed in a conversation: send fewer",
                param=f"messages[{number}].content",
            )
        yield message


def _read_message(value: Any, path: str, limits: LimitsConfig, tools: dict[str, str]) -> Message:
    """Read one message.

    Args:
        value: the message.
        path: where it stands in the request.
        limits: limits on its images.
        tools: the name of the tool of each call so far, by the call's id; calls are added.
    """
    if not isinstance(value, dict):
        raise RequestError(
            f"{path} is {kind_of(value)}: "
            'send an object like {"role": "user", "content": "Hello"}',
            param=path,
        )
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(
            f"{path}.role is {show(role) if 'role' in value else 'missing'}: "
            f"use one of {', '.join(ROLES)}",
            param=f"{path}.role",
        )
    parts = list(_read_content(value.get("content"), f"{path}.content", limits))
    if role == "assistant":
        if is_blank(parts) and isinstance(refusal := value.get("refusal"), str):
            check_unicode(refusal, f"{path}.refusal")
            parts = [TextPart(refusal)]
        calls = list(_read_calls(value, path, tools))
        if calls:
            separator = [] if is_blank(parts) else [TextPart("\n")]
            parts = [*parts, *separator, TextPart("\n".join(calls))]
    if role in TOOL_ROLES:
        name = tools.get(str(value.get("tool_call_id"))) or value.get("name")
        if isinstance(name, str):
            check_unicode(name, f"{path}.name")
            parts = [TextPart(f"Result of {name}: "), *parts]
    return Message(ROLES[role], tuple(parts))


def _read_calls(value: dict[str, Any], path: str, tools: dict[str, str]) -> Iterator[str]:
    """Yield the text of each tool call in a message of the assistant."""
    calls = value.get("tool_calls")
    if not isinstance(calls, list | None):
        raise RequestError(
            f"{path}.tool_calls is {kind_of(calls)}: send a list, or leave it out",
            param=f"{path}.tool_calls",
        )
    places: list[tuple[str, Any]] = [
        (f"{path}.tool_calls[{i}]", call) for i, call in enumerate(calls or ())
    ]
    if (older := value.get("function_call")) is not None:
        places.append((f"{path}.function_call", {"function": older}))
    for place, call in places:
        described = call.get("function", call.get("custom")) if isinstance(call, dict) else None
        name = described.get("name") if isinstance(described, dict) else None
        if not isinstance(name, str):
            raise RequestError(
                f"{place} is not a tool call: send an object like "
                '{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}',
                param=place,
            )
        assert isinstance(described, dict)
        given = described.get("arguments", described.get("input", ""))
        given = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        text = f"Call of {name}({given})"
        check_unicode(text, place)
        if isinstance(call, dict) and isinstance(call.get("id"), str):
            tools[call["id"]] = name
        yield text


def _read_content(value: Any, path: str, limits: LimitsConfig) -> Iterator[Part]:
    """Yield the parts of a message; null is an empty message."""
    if value is None:
        return
    if isinstance(value, str):
        check_unicode(value, path)
        yield TextPart(value)
        return
    if not isinstance(value, list):
        raise RequestError(
            f"{path} is {kind_of(value)}: send a string, or a list of text and image_url parts",
            param=path,
        )
    for number, item in enumerate(value):
        part = _read_part(item, f"{path}[{number}]", limits)
        if part is not None:
            yield part


def _read_part(value: Any, path: str, limits: LimitsConfig) -> Part | None:
    """Return a part; None for one without content, or with what models do not see."""
    if value is None:
        return None
    if isinstance(value, str):
        value = {"type": "text", "text": value}
    if not isinstance(value, dict):
        raise RequestError(
            f'{path} is {kind_of(value)}: send a part like {{"type": "text", "text": "Hello"}}',
            param=path,
        )
    kind = value.get("type")
    if kind is None:  # as in vLLM, the field tells the type
        kind = next((name for name in ("text", "image_url") if name in value), None)
    if not isinstance(kind, str):
        raise RequestError(
            f"{path}.type is {show(kind)}: use text or image_url", param=f"{path}.type"
        )
    if kind in TEXT_FIELDS:
        return _read_text(value.get(TEXT_FIELDS[kind]), f"{path}.{TEXT_FIELDS[kind]}")
    if kind in IMAGE_TYPES:
        return _read_image(value, path, limits)
    if kind in PASSED_OVER_TYPES:
        return None
    if kind in _OTHER_TYPES:
        raise UnsupportedError(
            f"{_OTHER_TYPES[kind]} in messages: this server takes text and image_url parts",
            param=f"{path}.type",
        )
    raise RequestError(f"{path}.type is {show(kind)}: use text or image_url", param=f"{path}.type")


def _read_text(text: Any, path: str) -> TextPart | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise RequestError(f"{path} is {kind_of(text)}: send a string", param=path)
    check_unicode(text, path)
    return TextPart(text)


def _read_image(part: dict[str, Any], path: str, limits: LimitsConfig) -> ImagePart:
    image, path = part.get("image_url"), f"{path}.image_url"
    detail = part.get("detail")
    if isinstance(image, dict):
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
