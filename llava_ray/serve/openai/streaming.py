"""The OpenAI API, outwards: chunks become one object with choices, or an event stream of pieces.

The two forms of a choice, of a chat and of a plain completion, are written here side by side.
Source: https://platform.openai.com/docs/api-reference/chat/streaming, and .../completions.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from llava_ray.serve.openai.errors import describe_usage
from llava_ray.types import Chunk, FinishReason, TokenLogprob, count_usage

_LOWEST = -9999.0  # JSON has no infinity


class ResponseMeta(NamedTuple):
    """What all objects of one answer have in common.

    Attributes:
        completion_id: its name.
        model: the name of the model that answers.
        created: seconds since 1970.
        answers_each: answers to each prompt.
        num_answers: answers in all.
    """

    completion_id: str
    model: str
    created: int
    answers_each: int = 1
    num_answers: int = 1


class ResponseFormatter(Protocol):
    """How one kind of answer is written. Implementations: ChatFormatter, CompletionFormatter."""

    object_name: str
    chunk_object_name: str

    def final(self, chunk: Chunk) -> dict[str, Any]:
        """Return the choice for an answer whose chunks were joined."""
        ...

    def first(self) -> dict[str, Any] | None:
        """Return what the first event of an answer's choice holds, if there is such an event."""
        ...

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """Return what an event's choice holds for a chunk's text and logprobs."""
        ...

    def finish(self) -> dict[str, Any]:
        """Return what the last event of an answer's choice holds beside the reason."""
        ...


class ChatFormatter:
    """Choices of a chat.

    Args:
        has_logprobs: they were asked for.
    """

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, *, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs

    def final(self, chunk: Chunk) -> dict[str, Any]:
        message = {"role": "assistant", "content": chunk.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(chunk)}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        return {"delta": {"content": chunk.text}, "logprobs": self._logprobs(chunk)}

    def finish(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, chunk: Chunk) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            _describe(token.data, token.logprob)
            | {"top_logprobs": [_describe(*each) for each in token.top]}
            for token in chunk.logprobs
        ]
        return {"content": content, "refusal": None}


class CompletionFormatter:
    """Choices of a plain completion.

    Args:
        has_logprobs: they were asked for.
    """

    object_name = chunk_object_name = "text_completion"

    def __init__(self, *, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs
        self._offsets: dict[int, int] = {}  # answer -> characters that its logprobs stand for

    def final(self, chunk: Chunk) -> dict[str, Any]:
        return self.delta(chunk)

    def first(self) -> None:
        return None

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        return {"text": chunk.text, "logprobs": self._logprobs(chunk)}

    def finish(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _logprobs(self, chunk: Chunk) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        offset = self._offsets.get(chunk.answer, 0)
        offsets = []
        for token in chunk.logprobs:
            offsets.append(offset)
            offset += len(_spell(token.data))
        self._offsets[chunk.answer] = offset
        return {
            "tokens": [_spell(token.data) for token in chunk.logprobs],
            "token_logprobs": [max(token.logprob, _LOWEST) for token in chunk.logprobs],
            "top_logprobs": [_rank(token) for token in chunk.logprobs],
            "text_offset": offsets,
        }


def build_completion(
    chunks: Iterable[Chunk], formatter: ResponseFormatter, meta: ResponseMeta
) -> dict[str, Any]:
    """Return all the answers to a request as one object."""
    answers: dict[int, Chunk] = {}
    for chunk in chunks:
        before = answers.get(chunk.answer)
        answers[chunk.answer] = before.join(chunk) if before else chunk
    usage = count_usage(answers.values(), answers_each=meta.answers_each)
    return {
        "id": meta.completion_id,
        "object": formatter.object_name,
        "created": meta.created,
        "model": meta.model,
        "choices": [
            {"index": index, **formatter.final(answer), "finish_reason": answer.finish_reason}
            for index, answer in sorted(answers.items())
        ],
        "usage": describe_usage(usage),
        "system_fingerprint": None,
    }


@dataclass
class _ChoiceState:
    """What is known of one answer while it is written: the text of its events around its own."""

    before: str
    after: str
    latest: Chunk = field(default=Chunk("", None, 0, 0, 0))


class ChunkEncoder:
    """Writes the chunks of the answers to one request as server-sent events.

    A token costs one `json.dumps` of its text; all that stays the same is written once.
    """

    def __init__(
        self, formatter: ResponseFormatter, meta: ResponseMeta, *, include_usage: bool
    ) -> None:
        fields = {
            "id": meta.completion_id,
            "object": formatter.chunk_object_name,
            "created": meta.created,
            "model": meta.model,
            "system_fingerprint": None,
        }
        self._formatter = formatter
        self._answers_each = meta.answers_each
        self._num_open = meta.num_answers
        self._include_usage = include_usage
        self._head = "data: " + json.dumps(fields)[:-1]
        self._tail = ', "usage": null}\n\n' if include_usage else "}\n\n"
        self._written: dict[int, _ChoiceState] = {}

    def encode(self, chunk: Chunk) -> bytes:
        """Return the events for a chunk; nothing for one that adds nothing."""
        events = ""
        written = self._written.get(chunk.answer)
        if written is None:
            written = self._written[chunk.answer] = self._begin(chunk.answer)
            if opening := self._formatter.first():
                events = self._event(chunk.answer, opening)
        if chunk.logprobs:
            events += self._event(chunk.answer, self._formatter.delta(chunk))
        elif chunk.text:
            events += f"{written.before}{json.dumps(chunk.text)}{written.after}"
        if chunk.finish_reason:
            written.latest = chunk
            self._num_open -= 1
            events += self._event(chunk.answer, self._formatter.finish(), chunk.finish_reason)
            if self._include_usage and not self._num_open:
                events += self._write_usage()
        return events.encode()

    def _begin(self, index: int) -> _ChoiceState:
        empty = Chunk("", None, 0, 0, 0, index)
        before, _, after = self._event(index, self._formatter.delta(empty)).rpartition('""')
        return _ChoiceState(before, after)

    def _event(
        self, index: int, fields: dict[str, Any], finish_reason: FinishReason | None = None
    ) -> str:
        choice = json.dumps({"index": index, **fields, "finish_reason": finish_reason})
        return f'{self._head}, "choices": [{choice}]{self._tail}'

    def _write_usage(self) -> str:
        latest = [written.latest for written in self._written.values()]
        usage = describe_usage(count_usage(latest, answers_each=self._answers_each))
        return f'{self._head}, "choices": [], "usage": {json.dumps(usage)}}}\n\n'


def _describe(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _spell(data), "logprob": max(logprob, _LOWEST), "bytes": list(data)}


def _rank(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the one that was chosen, by their texts."""
    return {
        _spell(data): max(logprob, _LOWEST)
        for data, logprob in [(token.data, token.logprob), *token.top]
    }


def _spell(data: bytes) -> str:
    return data.decode(errors="replace")
