"""Reads lists of messages: of `from` and `value` (LLaVA, ShareGPT), or `role` and `content`."""

from typing import Any

from llava_ray.data.sources.building import (
    Row,
    describe,
    parse_text,
    read_dict,
    read_text,
    write_message,
)
from llava_ray.data.sources.image_fields import read_image
from llava_ray.data.sources.readers import list_fields
from llava_ray.errors import SampleError
from llava_ray.template import IMAGE_TOKEN
from llava_ray.types import IMAGE, ImagePart, Message, Role, TextPart

_SPEAKERS: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_UNUSABLE_IN_MESSAGES = {
    "tool_calls": "calls of tools",
    "function_call": "a call of a function",
    "audio": "a recording",
    "reasoning_content": "reasoning beside the answer",
}
_LEARN_MARKS = ("weight", "train", "loss")
"""Fields of an answer that say, with 0 or false, that it is not learned."""


def read_turns(turns: Any, name: str) -> tuple[list[Message], list[bytes | str | None]]:
    """Return messages, and for each image in them its own content, or None for the row's next one.

    Args:
        turns: the list, as it is in a row.
        name: of its field, for messages.

    Raises:
        SampleError: it is not a list of messages, or a sample cannot express one of them.
    """
    if not isinstance(turns, list | tuple):
        raise SampleError(f"{name} is {describe(turns)}: write a list", reason="bad_row")
    messages: list[Message] = []
    inline: list[bytes | str | None] = []
    for i, turn in enumerate(turns):
        role, parts, images = _read_turn(read_dict(turn, f"{name}[{i}]"))
        if not i and role == "assistant" and "from" in turn:
            continue  # as LLaVA's trainer does
        messages.append(Message(role, tuple(parts)))
        inline += images
    return messages, inline


def _read_turn(turn: Row) -> tuple[Role, list[TextPart | ImagePart], list[bytes | str | None]]:
    """Return a message's role and parts, and for each image its own content, or None."""
    refuse_fields(turn, _UNUSABLE_IN_MESSAGES, "a message")
    if not {"from", "role"} & set(turn) or not {"value", "content"} & set(turn):
        raise SampleError(
            f"a message has the fields {list_fields(turn)}: name them from and value, or role and "
            "content",
            reason="bad_row",
        )
    role = _read_speaker(turn["from"] if turn.get("from") is not None else turn["role"])
    is_marked = any(turn.get(mark) is not None and not turn[mark] for mark in _LEARN_MARKS)
    if role == "assistant" and is_marked:
        raise SampleError(
            "an answer is marked as not to be learned, which shards cannot keep: leave the row out",
            reason="unsupported",
        )
    content = turn["value"] if turn.get("value") is not None else turn["content"]
    if isinstance(content, str):
        parts = list(write_message(role, content).parts)
        return role, parts, [None for part in parts if isinstance(part, ImagePart)]
    if not isinstance(content, list | tuple):
        raise SampleError(
            f"the content of a message is {describe(content)}: write a text or a list of parts",
            reason="bad_row",
        )
    parts: list[TextPart | ImagePart] = []
    images: list[bytes | str | None] = []
    for part in content:
        found, image = _read_part(part if isinstance(part, str) else read_dict(part, "a part"))
        parts += found
        images += [image for piece in found if isinstance(piece, ImagePart)]
    return role, parts, images


def _read_part(part: Row | str) -> tuple[list[TextPart | ImagePart], bytes | str | None]:
    """Return the parts of a part of a message, and the content of its image if it has its own."""
    if isinstance(part, str):
        return parse_text(part), None
    kind = part["type"]
    if kind in ("text", "input_text", "output_text"):
        text = read_text(part["text"], "a text part")
        return (parse_text(text) if IMAGE_TOKEN in text else [TextPart(text)]), None
    if kind in ("image_url", "input_image"):
        return [IMAGE], read_image(part["image_url"], "image_url")
    if kind == "image":
        inner = (part.get(key) for key in ("image", "url", "path", "image_url"))
        given = next((value for value in inner if value), None)
        return [IMAGE], None if given is None else read_image(given, "an image part")
    raise SampleError(
        f"a part of a message is {kind!r:.60}: only text and images can be learned",
        reason="unsupported",
    )


def _read_speaker(name: Any) -> Role:
    if not isinstance(name, str) or name not in _SPEAKERS:
        raise SampleError(
            f"unknown speaker {name!r:.60}: name each speaker one of {', '.join(_SPEAKERS)}",
            reason="roles",
        )
    return _SPEAKERS[name]


def refuse_fields(row: Row, fields: dict[str, str], where: str) -> None:
    """Raise a `SampleError` if one of the fields, given with their meanings, is not empty."""
    for name, meaning in fields.items():
        if row.get(name) and row[name] != "[]":
            raise SampleError(
                f"{where} has {meaning} ({name}), which is neither read nor learned: leave it out",
                reason="unsupported",
            )
