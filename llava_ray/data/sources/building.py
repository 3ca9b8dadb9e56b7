"""What converters are written with: rows as they were found, and turns of a conversation.

A converter is a pure function from a row to a `Sample`. It may raise a `SampleError`; what Python
raises where a field is missing or of the wrong kind is as good, and rejects the row too.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from llava_ray.errors import SampleError
from llava_ray.template import IMAGE_TOKEN
from llava_ray.types import IMAGE, ImagePart, Message, Role, Sample, TextPart

Row = dict[str, Any]

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
ONE_SENTENCE = "Provide a one-sentence caption for the provided image."
REGION_TO_TEXT = "Please provide a short description for this region: {}."
TEXT_TO_REGION = (
    "Please provide the bounding box coordinate of the region this sentence describes: {}."
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class RawRow(NamedTuple):
    """A row as it was found.

    Attributes:
        where: the file, and the line or place in it.
        row: what stood there, or why it cannot be read.
    """

    where: str
    row: Row | SampleError


def write_message(role: Role, text: str) -> Message:
    """Return a message; each `<image>` in the text is an image.

    One line break before and after an image belongs to it, and not to the text: templates write
    their own.
    """
    parts: list[TextPart | ImagePart] = []
    pieces = text.split(IMAGE_TOKEN)
    for i, piece in enumerate(pieces):
        if i:
            parts.append(IMAGE)
            piece = piece.removeprefix("\n")
        if i < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(TextPart(piece))
    return Message(role, tuple(parts))


def user(text: str) -> Message:
    """Return a question; each `<image>` in it is an image."""
    return write_message("user", text)


def assistant(text: str) -> Message:
    """Return an answer, which holds no images."""
    return Message("assistant", (TextPart(text),))


def make_turns(turns: Sequence[tuple[str, str]], *, num_images: int = 1) -> tuple[Message, ...]:
    """Return questions and answers about images, which stand before the first."""
    messages: list[Message] = []
    images = f"{IMAGE_TOKEN}\n" * num_images
    for question, answer in turns:
        messages += [user(images + question), assistant(answer)]
        images = ""
    return tuple(messages)


def write_options(choices: Sequence[str]) -> str:
    """Return choices as lines, "A. first"."""
    return "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent of several people's answers, the first of equals."""
    if not answers:
        raise SampleError("it has no answers: leave it out of training", reason="bad_row")
    return max(answers, key=answers.count)


def write_box(x: float, y: float, width: float, height: float, *, size: tuple[int, int]) -> str:
    """Return a box as LLaVA's 665k mix writes it: corners in the image padded to a square.

    Args:
        x, y: its upper left corner, in pixels.
        width, height: of the box.
        size: width and height of the image.

    Returns:
        "[left, top, right, bottom]", shares of the square's side with two decimals.
    """
    side = max(size)
    left, top = ((side - length) // 2 for length in size)
    edges = (x + left, y + top, x + width + left, y + height + top)
    return str([round(min(max(edge / side, 0.0), 1.0), 2) for edge in edges])


def choose(key: str, num: int) -> int:
    """Return a number below `num` that looks random and is the same for the same key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % num


def read_id(row: Row) -> str:
    """Return a row's own id, or for want of one a digest of its content."""
    found = row.get("id", row.get("sample_id"))
    return digest_content(row) if found is None else str(found)


def digest_content(content: object) -> str:
    """Return 16 hexadecimal digits that stand for some content."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def make_sample(
    source: str, sample_id: object, messages: Sequence[Message], *images: bytes | str
) -> Sample:
    """Return a sample."""
    return Sample(str(sample_id), tuple(messages), tuple(images), source)
