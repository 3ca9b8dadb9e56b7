"""Writes OpenAI responses: chunks -> one JSON object with choices, or server-sent events.

A formatter writes the choices of one kind of response: of a chat or of a plain completion.
Source: https://platform.openai.com/docs/api-reference/chat/streaming, and .../completions.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from llava_ray.serve.openai.errors import describe_usage
from llava_ray.serve.usage import count_usage
from llava_ray.types import Chunk, FinishReason, TokenLogprob

_LOWEST = -9999.0  # JSON has no infinity


class ResponseMeta(NamedTuple):
    """The fields that all JSON objects of one response share.

    Attributes:
        completion_id: the response's id.
        model: the model's name.
        created: seconds since 1970.
        answers_each: number of answers to each prompt.
        num_answers: number of answers in total.
    """

    completion_id: str
    model: str
    created: int
    answers_each: int = 1
    num_answers: int = 1


class ResponseFormatter(Protocol):
    """Writes the choices of one kind of response: ChatFormatter or CompletionFormatter.

    Attributes:
        object_name: the field `object` of a complete response.
        chunk_object_name: the field `object` of a streamed event.
    """

    object_name: str
    chunk_object_name: str

    def final(self, chunk: Chunk) -> dict[str, Any]:
        """Return the choice of a complete answer; `chunk` has all its chunks joined."""
        ...

    def first(self) -> dict[str, Any] | None:
        """Return the choice of the event that opens an answer; None: there is no such event."""
        ...

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        """Return the choice of the event for a chunk's text and logprobs."""
        ...

    def finish(self) -> dict[str, Any]:
        """Return the choice of an answer's last event, without `finish_reason`."""
        ...


class ChatFormatter:
    """Writes the choices of a chat.

    Args:
        has_logprobs: whether logprobs were requested.
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
    """Writes the choices of a plain completion.

    Args:
        has_logprobs: whether logprobs were requested.
    """

    object_name = chunk_object_name = "text_completion"

    def __init__(self, *, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs
        self._offsets: dict[int, int] = {}  # answer -> characters that its logprobs cover so far

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
    """Return all answers to a request as one JSON object."""
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
        "system_fingerprint": _find_fingerprint(answers.values()),
    }


@dataclass
class _ChoiceState:
    """The state of one streamed answer: its last chunk, and the constant text of its events."""

    before: str
    after: str
    latest: Chunk = field(default=Chunk("", None, 0, 0, 0))


class ChunkEncoder:
    """Encodes the chunks of one response as server-sent events.

    A chunk costs one `json.dumps` of its text; the constant parts of events are encoded once.

    Args:
        formatter: writes the choices.
        meta: what all events share.
        include_usage: the last event has the token counts; in the others they are null.
        continuous_usage: the others have the token counts so far.
    A chunk costs one `json.dumps` of its text; the constant parts of events are encoded once, when
    the first chunk tells the fingerprint.
    """

    def __init__(
        self,
        formatter: ResponseFormatter,
        meta: ResponseMeta,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
    ) -> None:
        self._fields = {
            "id": meta.completion_id,
            "object": formatter.chunk_object_name,
            "created": meta.created,
            "model": meta.model,
        }
        self._formatter = formatter
        self._answers_each = meta.answers_each
        self._num_open = meta.num_answers
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._head = ""
        self._tail = ', "usage": null}\n\n' if include_usage else "}\n\n"
        self._choices: dict[int, _ChoiceState] = {}

    def encode(self, chunk: Chunk) -> bytes:
        """Return the events for a chunk; b"" for a chunk without content."""
        events = ""
        if not self._head:
            fields = {**self._fields, "system_fingerprint": chunk.fingerprint or None}
            self._head = "data: " + json.dumps(fields)[:-1]
        choice_state = self._choices.get(chunk.answer)
        if choice_state is None:
            choice_state = self._choices[chunk.answer] = self._begin(chunk.answer)
            if opening := self._formatter.first():
                choice_state.latest = chunk._replace(num_tokens=0)
                events = self._event(chunk.answer, opening)
        choice_state.latest = chunk
        if chunk.logprobs:
            events += self._event(chunk.answer, self._formatter.delta(chunk))
        elif chunk.text:
            text = json.dumps(chunk.text)
            events += f"{choice_state.before}{text}{choice_state.after}{self._write_tail()}"
        if chunk.finish_reason:
            self._num_open -= 1
            events += self._event(chunk.answer, self._formatter.finish(), chunk.finish_reason)
            if self._include_usage and not self._num_open:
                events += self._write_usage()
        return events.encode()

    def _begin(self, index: int) -> _ChoiceState:
        empty = Chunk("", None, 0, 0, 0, index)
        event = self._write_event(index, self._formatter.delta(empty))
        before, _, after = event.rpartition('""')
        return _ChoiceState(before, after)

    def _event(
        self, index: int, fields: dict[str, Any], finish_reason: FinishReason | None = None
    ) -> str:
        return self._write_event(index, fields, finish_reason) + self._write_tail()

    def _write_event(
        self, index: int, fields: dict[str, Any], finish_reason: FinishReason | None = None
    ) -> str:
        """Return an event up to its usage."""
        choice = json.dumps({"index": index, **fields, "finish_reason": finish_reason})
        return f'{self._head}, "choices": [{choice}]'

    def _write_tail(self) -> str:
        """Return the end of an event with a choice."""
        if not self._continuous_usage:
            return self._tail
        return f', "usage": {self._describe_usage()}}}\n\n'

    def _write_usage(self) -> str:
        return f'{self._head}, "choices": [], "usage": {self._describe_usage()}}}\n\n'

    def _describe_usage(self) -> str:
        """Return the token counts so far, as JSON."""
        latest = [choice_state.latest for choice_state in self._choices.values()]
        return json.dumps(describe_usage(count_usage(latest, answers_each=self._answers_each)))


def _find_fingerprint(answers: Iterable[Chunk]) -> str | None:
    return next((answer.fingerprint for answer in answers if answer.fingerprint), None)


def _describe(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _spell(data), "logprob": max(logprob, _LOWEST), "bytes": list(data)}


def _rank(token: TokenLogprob) -> dict[str, float]:
    """Return the logprobs of the top tokens and of the chosen token, by their text."""
    return {
        _spell(data): max(logprob, _LOWEST)
        for data, logprob in [(token.data, token.logprob), *token.top]
    }


def _spell(data: bytes) -> str:
    return data.decode(errors="replace")
