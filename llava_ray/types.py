"""The records that cross the boundaries between the parts of the package.

request (user) -> prompt (rendered) -> sequence (scheduled) -> chunk (streamed); sample (row) ->
batch (tensors). They are plain, frozen and picklable, and know neither HTTP nor tensors.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from PIL import Image as PILImage

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text in a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An encoded picture (PNG, JPEG, ...) in a message, as it came from the client.

    Attributes:
        data: the file's bytes.
        param: where in the request it stood, for error messages ("messages[0].content[1]").
    """

    data: bytes
    param: str = "messages"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; the parts are in the order in which the model reads them."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen and when generation ends.

    Attributes:
        max_tokens: at most this many new tokens; None: as many as the context still holds.
        temperature: 0 is greedy.
        top_p: nucleus sampling (Holtzman et al. 2019), 0 < top_p <= 1.
        stop: generation ends before the first of these texts; they are not part of the answer.
        seed: makes sampling repeatable.
        ignore_eos: go on after the end-of-sequence token (for load tests).
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation that a user wants continued, checked and free of wire format."""

    request_id: str
    model: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request rendered with a model's template: what an engine takes.

    Attributes:
        request_id: names the request in logs and errors.
        text: the whole prompt, with one `<image>` for each picture, in order.
        images: the decoded pictures, RGB.
        sampling: how to continue it.
    """

    request_id: str
    text: str
    images: tuple["PILImage.Image", ...] = ()
    sampling: Sampling = field(default_factory=Sampling)


PICTURE = ImagePart(b"", param="images")
"""Stands in the messages of a `Sample` for the next of its pictures."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation to learn from: what a row of any data set becomes.

    Attributes:
        sample_id: names it within its data set, in every run.
        messages: the conversation, with `PICTURE` for each picture.
        images: the pictures, in order: encoded files as they came or, before these are read, their
            names in the folder of pictures.
        source: the kind of data that it came from ("llava", "scienceqa").
    """

    sample_id: str
    messages: tuple[Message, ...]
    images: tuple[bytes | str, ...] = ()
    source: str = ""


class Chunk(NamedTuple):
    """A piece of an answer, streamed as soon as it is known.

    Attributes:
        text: what this piece adds to the answer; may be empty. The texts joined are the answer.
        finish_reason: None until the last chunk: "stop" (end of sequence or a stop text) or
            "length" (`max_tokens` or the end of the context).
        num_tokens: tokens generated so far, this chunk's included.
        num_prompt_tokens: tokens of the prompt, image tokens included.
        num_image_tokens: tokens of the prompt that stand for pictures.
    """

    text: str
    finish_reason: FinishReason | None
    num_tokens: int
    num_prompt_tokens: int
    num_image_tokens: int
