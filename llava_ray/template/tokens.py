"""Segments of text -> token ids and labels; and what templates read of a message.

The last step of every template. A template hands over segments of text and whether each is learned;
the joined text is tokenised as the model reads it, and a token is learned if its first character
is. So ids and labels cannot disagree, whatever the tokenizer does at the border of two segments.

Shapes: T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_ray.errors import ConfigError, RequestError
from llava_ray.types import ImagePart, Message, TextPart

IMAGE_TOKEN = "<image>"
IMAGE_PLACEHOLDER = -200
"""Stands for a whole image in token ids, as in LLaVA's own code."""
IGNORED = -100
"""The label of a token that is not learned."""

OPENING, CLOSING = "([{", ".,;:!?)]}"
"""Characters that may directly precede an image and directly follow it."""


def split_parts(message: Message) -> list[str | None]:
    """Return a message's parts in order: adjacent texts joined, None for each image."""
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


def count_images(messages: Sequence[Message]) -> int:
    """Return how many images the messages contain."""
    return sum(isinstance(part, ImagePart) for message in messages for part in message.parts)


def touch(before: str, after: str) -> bool:
    """Return whether two texts would run together: no space or punctuation separates them."""
    if not before or not after:
        return False
    is_apart = before[-1].isspace() or before[-1] in OPENING
    return not (is_apart or after[0].isspace() or after[0] in CLOSING)


def check_images(prompt: str, num_images: int, image_token: str = IMAGE_TOKEN) -> None:
    """Raise a `RequestError` unless a prompt has exactly one image token for each image."""
    if prompt.count(image_token) != num_images:
        raise RequestError(
            f"the prompt names {prompt.count(image_token)} images and {num_images} came with it: "
            f"write {image_token} once for each image",
            param="messages",
        )


class Segment(NamedTuple):
    """A stretch of a conversation's text, and whether the model is trained to write it."""

    text: str
    is_learned: bool = False


class EncodedConversation(NamedTuple):
    """A tokenised conversation for training.

    Attributes:
        input_ids: T ids, `IMAGE_PLACEHOLDER` for each image.
        labels: T labels: the id itself where it is learned, `IGNORED` elsewhere.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Notation:
    """How one checkpoint writes images and tokenises text.

    Attributes:
        image_token: stands for an image in text.
        marks: written before and after it (`<im_start>`, `<im_end>`) for checkpoints with
            `mm_use_im_start_end`.
        special_tokens: texts with a meaning to the tokenizer. They are broken up where users type
            them, so that nobody can end a turn or claim an image that way.
        in_pieces: tokenise as LLaVA's own code does, each piece between two images by itself;
            otherwise the whole text at once, as transformers' processors do.
    """

    image_token: str = IMAGE_TOKEN
    marks: tuple[str, str] = ("", "")
    special_tokens: tuple[str, ...] = (IMAGE_TOKEN, "<s>", "</s>")
    in_pieces: bool = True

    @property
    def image(self) -> str:
        """The text that stands for an image."""
        return self.marks[0] + self.image_token + self.marks[1]

    def quote(self, text: str) -> str:
        """Return a user's text with a space inside each special token."""
        for token in self.special_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def tokenize_pieces(tokenizer: Any, text: str, image_token: str = IMAGE_TOKEN) -> list[int]:
    """Return a prompt's ids as LLaVA's code computes them, `IMAGE_PLACEHOLDER` for each image.

    Each piece between two images is tokenised by itself, and only the first keeps its
    beginning-of-sequence token. Tokenizers treat the start of a text specially, so the ids differ
    from those of the whole text.
    """
    return [id_ for id_, _ in _read_pieces(tokenizer, text, image_token, has_places=False)]


def encode_segments(
    tokenizer: Any, segments: Sequence[Segment], notation: Notation
) -> EncodedConversation:
    """Return the ids of the joined segments, and their labels.

    Raises:
        ConfigError: the tokenizer gives no offsets of its tokens.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} does not give the offsets of its tokens, "
            "which labels are computed from: save it as tokenizer.json (`use_fast=True`)"
        )
    text = "".join(segment.text for segment in segments)
    is_learned = [segment.is_learned for segment in segments for _ in segment.text]
    read = _read_pieces if notation.in_pieces else _read_whole
    ids: list[int] = []
    labels: list[int] = []
    for id_, place in read(tokenizer, text, notation.image_token):
        ids.append(id_)
        kept = place is not None and is_learned[min(place, len(text) - 1)]
        labels.append(id_ if kept else IGNORED)
    return EncodedConversation(ids, labels)


def _read_pieces(
    tokenizer: Any, text: str, image_token: str, *, has_places: bool = True
) -> Iterator[tuple[int, int | None]]:
    """Yield each id and the offset in the text at which it begins (None: not from the text)."""
    beginning: list[int] = tokenizer("").input_ids[:1]
    begins = bool(beginning) and beginning == [tokenizer.bos_token_id]
    place = 0
    if begins:
        yield beginning[0], None
        if text.startswith(tokenizer.bos_token):  # the template has written it already
            place = len(tokenizer.bos_token)
    for i, piece in enumerate(text[place:].split(image_token)):
        if i:
            yield IMAGE_PLACEHOLDER, None
        read = tokenizer(piece, return_offsets_mapping=has_places)
        places = read.offset_mapping if has_places else [(0, 0)] * len(read.input_ids)
        tokens = zip(read.input_ids, places, strict=True)
        yield from ((id_, place + first) for id_, (first, _) in list(tokens)[int(begins) :])
        place += len(piece) + len(image_token)


def _read_whole(tokenizer: Any, text: str, image_token: str) -> Iterator[tuple[int, int | None]]:
    """Yield the same as `_read_pieces` for a text that is tokenised as a whole."""
    bos = tokenizer.bos_token
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    read = tokenizer(
        text,
        add_special_tokens=not (bos and text.startswith(bos)),
        return_offsets_mapping=True,
    )
    for id_, (first, end) in zip(read.input_ids, read.offset_mapping, strict=True):
        if id_ == image_id:
            yield IMAGE_PLACEHOLDER, None
        else:
            yield id_, first if end or first else None
