"""The parts of a message as templates take them: runs of text, and pictures between them.

Texts are joined before anything is looked for in them, so that no special token can be typed in two
halves.
"""

from collections.abc import Sequence

from llava_ray.types import ImagePart, Message, TextPart

OPENING, CLOSING = "([{", ".,;:!?)]}"
"""What may stand right before a picture, and right behind it, among words."""


def split_parts(message: Message) -> list[str | None]:
    """Return a message's parts in order, neighbouring texts joined, None for each picture."""
    runs: list[str | None] = []
    for part in message.parts:
        if isinstance(part, ImagePart):
            runs.append(None)
        elif runs and isinstance(runs[-1], str):
            runs[-1] += part.text
        else:
            runs.append(part.text)
    return runs


def join_text(message: Message) -> str:
    """Return all the text of a message."""
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))


def count_pictures(messages: Sequence[Message]) -> int:
    """Return how many pictures stand in messages."""
    return sum(isinstance(part, ImagePart) for message in messages for part in message.parts)


def touch(before: str, after: str) -> bool:
    """Return whether neither text brings the space, bracket or stop that keeps them apart."""
    if not before or not after:
        return False
    is_apart = before[-1].isspace() or before[-1] in OPENING
    return not (is_apart or after[0].isspace() or after[0] in CLOSING)
