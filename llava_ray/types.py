"""The records that cross the boundaries between the parts of the package.

request (user) -> prompt (rendered) -> sequence (scheduled) -> chunk (streamed); sample (row) ->
batch (tensors). They are plain, frozen and picklable, and know neither HTTP nor tensors.
"""

from collections.abc import Iterable
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
    """An encoded image (PNG, JPEG, ...) in a message, as it came from the client.

    Attributes:
        data: the file's bytes; empty until the gateway has fetched them from `url`.
        param: where in the request it stood, for error messages ("messages[0].content[1]").
        url: where it comes from; empty for an image that came with the request.
    """

    data: bytes
    param: str = "messages"
    url: str = ""


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
        top_k: draw from this many of the likeliest tokens only; 0: all.
        min_p: tokens below this share of the likeliest one's probability are not drawn.
        presence_penalty: taken off the logit of each token that the answer holds already.
        frequency_penalty: the same, times how often the answer holds it.
        repetition_penalty: logits of tokens in prompt or answer are divided by it if positive,
            else multiplied (Keskar et al. 2019); 1 changes nothing.
        logit_bias: (token id, what is added to its logit), each id once.
        min_tokens: the answer cannot end by itself before it has this many tokens.
        stop_token_ids: generation ends at any of these too, also with `ignore_eos`.
        num_logprobs: return each token's logprob and those of this many likeliest tokens;
            None: no logprobs.
        json_schema: the answer is JSON that this JSON schema (as text) describes; None: any text.
        may_cut: a `max_tokens` that is more than the context leaves is cut to that; otherwise it
            is an error.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    json_schema: str | None = None
    may_cut: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is greedy: dividing logits by a smaller temperature could overflow."""
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation that a user wants continued, checked and free of wire format.

    Attributes:
        messages: system (optional), then user and assistant in turn. A last turn of the user is
            answered, one of the assistant is continued.
        num_answers: how many different answers are wanted.
        adapter: which of the model's adapters answers; empty: the model itself.
    """

    request_id: str
    model: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    num_answers: int = 1
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A prompt that its sender has rendered already and wants continued as it is.

    Attributes:
        prompt: the whole text, with one `<image>` for each image, in order.
        images: the encoded images.
        num_answers: how many different answers are wanted.
        adapter: as of `ChatRequest`.
    """

    request_id: str
    model: str
    prompt: str
    images: tuple[ImagePart, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    num_answers: int = 1
    adapter: str = ""


Request = ChatRequest | PromptRequest


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Texts that a user wants continued as they are, without a template.

    Attributes:
        prompts: each a text, or token ids.
        answers_each: how many different answers each prompt gets; they are numbered prompt by
            prompt.
        echo: each answer begins with its prompt.
        adapter: as of `ChatRequest`.
    """

    request_id: str
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling = field(default_factory=Sampling)
    answers_each: int = 1
    echo: bool = False
    adapter: str = ""

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.answers_each


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A conversation or a text of which a user wants to know the tokens.

    Attributes:
        source: a conversation, which is rendered with the model's template, or a text.
        add_special_tokens: what the tokenizer puts before a text is among them.
        add_generation_prompt: a conversation ends with the beginning of the answer.
    """

    source: ChatRequest | str
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class Tokens(NamedTuple):
    """The tokens of a prompt.

    Attributes:
        ids: an image is as many image tokens as it has features.
        texts: how the tokenizer writes each.
        context_length: longest prompt plus answer of the model.
    """

    ids: list[int]
    texts: list[str]
    context_length: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request rendered with a model's template: what an engine takes.

    Attributes:
        request_id: names the request in logs and errors.
        text: the whole prompt, with one `<image>` for each image, in order.
        images: the decoded images, RGB.
        sampling: how to continue it.
        token_ids: the prompt's tokens, in place of text and images.
        add_special_tokens: the tokenizer may put a beginning of sequence before the text.
        adapter: which of the model's adapters continues it; empty: the model itself.
    """

    request_id: str
    text: str
    images: tuple["PILImage.Image", ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    token_ids: tuple[int, ...] = ()
    add_special_tokens: bool = True
    adapter: str = ""


class TokenLogprob(NamedTuple):
    """How likely a token of an answer was to the model itself, before penalties and temperature.

    Attributes:
        data: the token's bytes; they may be a part of a character.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens in its place, with their logprobs, best first.
    """

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


IMAGE = ImagePart(b"", param="images")
"""Stands in the messages of a `Sample` for the next of its images."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation to learn from: what a row of any data set becomes.

    Attributes:
        sample_id: names it within its data set, in every run.
        messages: the conversation, with `IMAGE` for each image.
        images: the images, in order: encoded files as they came or, before these are read, their
            names in the folder of images.
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
        num_image_tokens: tokens of the prompt that stand for images.
        answer: which of the answers to a request this is a piece of, from 0.
        logprobs: of the tokens that begin in this piece, where they were asked for.
        num_cached_tokens: tokens of the prompt that did not have to be computed, because the
            engine had computed the same beginning before.
        fingerprint: which weights and settings answered (see `model.fingerprint`); "" if that is
            not known.
    """

    text: str
    finish_reason: FinishReason | None
    num_tokens: int
    num_prompt_tokens: int
    num_image_tokens: int
    answer: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    fingerprint: str = ""

    def join(self, later: "Chunk") -> "Chunk":
        """Return this piece and the next one of the same answer as one."""
        return later._replace(text=self.text + later.text, logprobs=self.logprobs + later.logprobs)


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a benchmark: what a model is asked, and what its response is measured by.

    Attributes:
        question_id: names it within its task, in every run.
        text: the whole question, as the model reads it after the images.
        images: where the images are (see `evaluate.images`).
        answers: what is right: one text, ten annotators' answers, five captions, ...
        choices: the options' texts, where there are options; the first is A.
        groups: what the score is broken down by ("split/adversarial", "grade/1-6").
        cluster: rows that share it are not independent (two questions about one image).
        context: what only a judge reads: the image, described in words.
        source_id: its id in the benchmark's files, which need not be unique.
        other_ids: further ids by which files of predictions may name it.
    """

    question_id: str
    text: str
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    cluster: str = ""
    context: str = ""
    source_id: str = ""
    other_ids: tuple[str, ...] = ()


PredictionStatus = Literal["answered", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What became of a question that a model was asked.

    Attributes:
        question_id: of the question.
        status: "refused": it cannot be asked as it is (no such image, too long); "failed": it
            could be, but the model or the way to it broke.
        text: the response, if it was answered.
        reason: why not, otherwise.
        finish_reason: see `Chunk`.
        latency_s: from the question to the end of the response.
        num_tokens: of the response.
        num_prompt_tokens: of the prompt, image tokens included.
        num_image_tokens: of the prompt's images.
        confidence: geometric mean of the probabilities that the model gave its own tokens; None
            where it was not told.
        image_sha256: of each image's file.
        cache_key: digest of model, question, images and settings; "" if it came from elsewhere.
        model_digest: of the model's files; of a server its fingerprint, or where it tells none the
            digest of its address.
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
    confidence: float | None = None
    image_sha256: tuple[str, ...] = ()
    cache_key: str = ""
    model_digest: str = ""


class Score(NamedTuple):
    """A scorer's judgment of one response.

    Attributes:
        value: 0 to 1 (a judge's is on the judge's scale); None: it could not be judged.
        parsed: the answer that was read out of the response.
        why: how the value came about, in a few words.
        figures: further numbers that the task's summary is made of.
        is_unread: no answer could be read out of the response, which counts as a wrong one.
    """

    value: float | None
    parsed: str = ""
    why: str = ""
    figures: tuple[float, ...] = ()
    is_unread: bool = False


class Usage(NamedTuple):
    """Tokens of one request, over all its prompts and answers; each prompt counts once."""

    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0


def count_usage(latest: Iterable[Chunk], *, answers_each: int = 1) -> Usage:
    """Return the sums over the latest chunk of each answer.

    Args:
        latest: one chunk for each answer that has begun.
        answers_each: answers to each prompt; their numbers are neighbours.
    """
    prompts: dict[int, Chunk] = {}
    num_tokens = 0
    for chunk in latest:
        num_tokens += chunk.num_tokens
        prompts[chunk.answer // answers_each] = chunk
    return Usage(
        sum(chunk.num_prompt_tokens for chunk in prompts.values()),
        sum(chunk.num_image_tokens for chunk in prompts.values()),
        num_tokens,
        sum(chunk.num_cached_tokens for chunk in prompts.values()),
    )
