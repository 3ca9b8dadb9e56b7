"""The records that cross the boundaries between the parts of the package.

request (user) -> prompt (rendered) -> sequence (scheduled) -> chunk (streamed). They are plain,
frozen and picklable, and know neither HTTP nor tensors.
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


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a benchmark: what a model is asked, and what its reply is measured by.

    Attributes:
        question_id: names it within its task, in every run.
        text: the whole question, as the model reads it after the pictures.
        images: the pictures: encoded files, or where they are (see `evaluate.pictures`).
        answers: what is right: one text, ten annotators' answers, five captions, ...
        choices: the options' texts, where there are options; the first is A.
        groups: what the score is broken down by ("split/adversarial", "grade/1-6").
        cluster: rows that share it are not independent (two questions about one picture).
        context: what only a judge reads: the picture, described in words.
        source_id: its id in the benchmark's files, which need not be unique.
    """

    question_id: str
    text: str
    images: tuple[bytes | str, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    cluster: str = ""
    context: str = ""
    source_id: str = ""


PredictionStatus = Literal["answered", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What became of a question that a model was asked.

    Attributes:
        question_id: of the question.
        status: "refused": it cannot be asked as it is (no such picture, too long); "failed": it
            could be, but the model or the way to it broke.
        text: the reply, if it was answered.
        reason: why not, otherwise.
        finish_reason: see `Chunk`.
        latency_s: from the question to the end of the reply.
        num_tokens: of the reply.
        num_prompt_tokens: of the prompt, image tokens included.
        num_image_tokens: of the prompt's pictures.
        image_sha256: of each picture's file.
        cache_key: digest of model, question, pictures and settings; "" if it came from elsewhere.
        model_digest: of the model's files, or of the address that was asked.
    """

    question_id: str
    status: PredictionStatus
    text: str = ""
    reason: str = ""
    finish_reason: FinishReason | None = None
    latency_s: float = 0.0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    image_sha256: tuple[str, ...] = ()
    cache_key: str = ""
    model_digest: str = ""


class Score(NamedTuple):
    """A scorer's judgment of one reply.

    Attributes:
        value: 0 to 1 (a judge's is on the judge's scale); None: it could not be judged.
        answer: what was read out of the reply.
        why: how the value came about, in a few words.
        figures: further numbers that the task's summary is made of.
    """

    value: float | None
    answer: str = ""
    why: str = ""
    figures: tuple[float, ...] = ()
