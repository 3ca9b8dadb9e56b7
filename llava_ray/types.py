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
    """Text in a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An encoded image (PNG, JPEG, ...) in a message, as it came from the client.

    Attributes:
        data: the file's bytes; empty until the gateway has fetched them from `url`.
        param: its path in the request, for error messages ("messages[0].content[1]").
        url: the URL to fetch it from; empty for an image that came with the request.
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
        max_tokens: at most this many new tokens; None: as many as still fit into the context.
        temperature: 0 is greedy.
        top_p: nucleus sampling (Holtzman et al. 2019), 0 < top_p <= 1.
        stop: generation ends before the first of these texts; they are not part of the answer.
        seed: makes sampling repeatable.
        ignore_eos: continue after the end-of-sequence token (for load tests).
        top_k: sample only from this many of the likeliest tokens; 0: all.
        min_p: never sample tokens below this fraction of the likeliest token's probability.
        presence_penalty: subtracted from the logit of each token that the answer contains already.
        frequency_penalty: likewise, multiplied by how often the answer contains the token.
        repetition_penalty: logits of tokens in prompt or answer are divided by it if positive,
            else multiplied (Keskar et al. 2019); 1 changes nothing.
        logit_bias: pairs (token id, number added to its logit), each id once.
        min_tokens: no end token is chosen before the answer has this many tokens.
        stop_token_ids: generation also ends at any of these, even with `ignore_eos`.
        num_logprobs: return the logprob of each token and of this many likeliest tokens;
            None: no logprobs.
        json_schema: the answer is JSON that conforms to this JSON schema (as text); None: any text.
        may_cut: a `max_tokens` that is more than the context leaves is reduced to that; otherwise
            it is an error.
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
        """Whether the likeliest token is chosen; dividing by a tiny temperature could overflow."""
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to continue, validated and independent of any wire format.

    Attributes:
        messages: system (optional), then user and assistant in turn. A last turn of the user is
            answered, one of the assistant is continued.
        num_answers: how many answers to sample.
        adapter: the LoRA adapter that answers; empty: the model itself.
    """

    request_id: str
    model: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    num_answers: int = 1
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A prompt to continue that its sender has rendered already.

    Attributes:
        prompt: the whole text, with one `<image>` for each image, in order.
        images: the encoded images.
        num_answers: how many answers to sample.
        adapter: see `ChatRequest`.
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
    """Prompts to continue without a template.

    Attributes:
        prompts: each is a text or token ids.
        answers_each: how many answers to sample for each prompt; they are numbered consecutively,
            prompt by prompt.
        echo: each answer begins with its prompt.
        adapter: see `ChatRequest`.
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
    """A conversation or a text to tokenize.

    Attributes:
        source: a conversation, which is rendered with the model's template, or a text.
        add_special_tokens: include the special tokens that the tokenizer adds to a text.
        add_generation_prompt: end a conversation with the beginning of the answer.
    """

    source: ChatRequest | str
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class Tokens(NamedTuple):
    """The tokens of a prompt.

    Attributes:
        ids: the token ids, with one image token for each feature of an image.
        texts: the text of each token.
        context_length: the model's maximum of prompt and answer together, in tokens.
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
        add_special_tokens: let the tokenizer put its beginning-of-sequence token before the text.
        adapter: the LoRA adapter that continues it; empty: the model itself.
    """

    request_id: str
    text: str
    images: tuple["PILImage.Image", ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    token_ids: tuple[int, ...] = ()
    add_special_tokens: bool = True
    adapter: str = ""


class TokenLogprob(NamedTuple):
    """The probability of an answer's token, before penalties and temperature.

    Attributes:
        data: the token's bytes, which may be part of a character.
        logprob: natural logarithm of the token's probability.
        top: the likeliest tokens at this position as (bytes, logprob), best first.
    """

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


IMAGE = ImagePart(b"", param="images")
"""Stands for the next of a `Sample`'s images in its messages."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation to train on; every kind of data set is converted to it.

    Attributes:
        sample_id: unique within its data set and the same in every run.
        messages: the conversation, with `IMAGE` for each image.
        images: the images, in order: unchanged encoded files or, before these are read, file names
            relative to the folder of images.
        source: the kind of data set ("llava", "scienceqa").
    """

    sample_id: str
    messages: tuple[Message, ...]
    images: tuple[bytes | str, ...] = ()
    source: str = ""


class Chunk(NamedTuple):
    """A part of an answer, streamed as soon as it is known.

    Attributes:
        text: the text that this chunk adds; may be empty. The joined texts are the answer.
        finish_reason: None until the last chunk: "stop" (end of sequence or a stop text) or
            "length" (`max_tokens` or the end of the context).
        num_tokens: tokens generated so far, including this chunk's.
        num_prompt_tokens: tokens of the prompt, including image tokens.
        num_image_tokens: image tokens of the prompt.
        answer: index of the answer, from 0, where a request has several.
        logprobs: of the tokens that begin in this chunk, if they were asked for.
        num_cached_tokens: tokens of the prompt whose keys and values the engine found in its
            prefix cache.
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
        """Return this chunk and the next one of the same answer as one chunk."""
        return later._replace(text=self.text + later.text, logprobs=self.logprobs + later.logprobs)


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a benchmark: the question for the model, and the references for scoring.

    Attributes:
        question_id: unique within its task and the same in every run.
        text: the whole question, as the model reads it after the images.
        images: paths or addresses of the images (see `evaluate.datasets.images`).
        answers: the right answers: one text, ten annotators' answers, five captions, ...
        choices: the texts of the options, if there are options; the first is A.
        groups: groups for which scores are reported too ("split/adversarial", "grade/1-6").
        cluster: rows of the same cluster are not independent (two questions about one image).
        context: a description of the image, for a judge only.
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
    """A model's response to a question, or why there is none.

    Attributes:
        question_id: see `Question`.
        status: "refused": the question cannot be asked (its image is missing, it is too long);
            "failed": the model or the connection to it broke.
        text: the response, if `status` is "answered".
        reason: why there is no response, otherwise.
        finish_reason: see `Chunk`.
        latency_s: seconds from the question to the end of the response.
        num_tokens: tokens of the response.
        num_prompt_tokens: tokens of the prompt, including image tokens.
        num_image_tokens: image tokens of the prompt.
        confidence: geometric mean of the probabilities that the model gave its own tokens; None if
            it returned none.
        image_sha256: digest of each image's file.
        cache_key: digest of model, question, images and settings; "" if it came from elsewhere.
        model_digest: digest of the model's files; for a server its fingerprint or, if it has none,
            the digest of its address.
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
    """The score of one response.

    Attributes:
        value: from 0 to 1 (a judge's score is on the judge's scale); None: it could not be scored.
        parsed: the answer that was extracted from the response.
        why: an explanation of the value, in a few words.
        figures: further numbers from which the task's metrics are computed.
        is_unread: no answer could be extracted; the response counts as wrong.
    """

    value: float | None
    parsed: str = ""
    why: str = ""
    figures: tuple[float, ...] = ()
    is_unread: bool = False
