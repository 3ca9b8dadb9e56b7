"""Converts between the page's chat messages and requests, and streams answers into the chat.

    chat messages -> read_history -> Message ... Chunk -> stream_answer -> chat messages

The chat messages are the only state: each request is built from them. An answer's message has its
id. Notes (token counts, errors) are marked and skipped, as are questions without an answer. A chat
message is a dict as in Gradio's Chatbot; this module does not import Gradio.
"""

import asyncio
import html
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.client import Client
from llava_ray.errors import LlavaRayError
from llava_ray.serve.page.image_modes import ImageMode, prepare_image
from llava_ray.types import ChatRequest, Chunk, ImagePart, Message, Sampling, TextPart

Chat = list[dict[str, Any]]
"""The value of Gradio's Chatbot."""

UPDATE_S = 0.05  # minimum time between two updates of the page
_NOTE = "note"


@dataclass(slots=True)
class PageAnswer:
    """A question to one model, and its answer so far.

    Attributes:
        history: the chat, which ends with the question.
        answer_id: identifies the answer on the page, in the gateway and in the log.
        messages: the conversation as it was sent.
        last: the last chunk, with the token counts; None until the answer is complete.
        seconds: time that the answer took.
    """

    model: str
    history: Chat
    sampling: Sampling
    image_mode: ImageMode = "default"
    answer_id: str = ""
    messages: tuple[Message, ...] = ()
    text: str = ""
    last: Chunk | None = None
    seconds: float = 0.0

    @property
    def shown(self) -> Chat:
        """Return the chat messages of the answer."""
        if not self.text:
            return []
        content = [{"type": "text", "text": self.text}]
        return [{"role": "assistant", "content": content, "metadata": {"id": self.answer_id}}]


async def stream_answer(url: str, answer: PageAnswer) -> AsyncGenerator[Chat]:
    """Yield the messages to show after the history, whenever the answer has grown.

    Args:
        url: the gateway's address.
        answer: the question; its answer is filled in. An error becomes a note with the request id.
    """
    answer.answer_id = f"page-{uuid.uuid4().hex}"
    started, shown = time.monotonic(), 0.0
    last: Chunk | None = None
    try:
        answer.messages = await asyncio.to_thread(
            read_history, answer.history, image_mode=answer.image_mode
        )
        request = ChatRequest(answer.answer_id, answer.model, answer.messages, answer.sampling)
        async with Client(url) as client, aclosing(client.stream(request)) as chunks:
            async for last in chunks:
                answer.text += last.text
                if time.monotonic() - shown > UPDATE_S:
                    yield answer.shown
                    shown = time.monotonic()
    except LlavaRayError as error:
        yield [*answer.shown, show_error(error)]
    else:
        answer.last, answer.seconds = last, time.monotonic() - started
        yield [*answer.shown, note(describe_figures(last, answer.seconds))]


def ask(history: Chat, text: str, paths: list[str]) -> Chat:
    """Return the chat with a question added: images first, as these models were trained."""
    content: list[Any] = [{"path": path} for path in paths]
    if text.strip():
        content.append({"type": "text", "text": text.strip()})
    return [*history, {"role": "user", "content": content}] if content else history


def rewind(history: Chat) -> Chat:
    """Return the chat up to its last question, to be answered again."""
    asked = find_questions(history)
    return history[: asked[-1] + 1] if asked else []


def take_back(history: Chat) -> tuple[Chat, str, list[str]]:
    """Return the chat before its last question, and that question's text and images."""
    before = rewind(history)[:-1]
    content = history[len(before)]["content"] if len(before) < len(history) else []
    text = "".join(part["text"] for part in content if part["type"] == "text")
    return before, text, [part["file"]["path"] for part in content if part["type"] == "file"]


def correct_answer(history: Chat, text: str) -> Chat:
    """Return the chat with another text as the answer to its last question."""
    at = find_answer(history)
    if at is None:
        return history
    corrected = {**history[at], "content": [{"type": "text", "text": text}]}
    return [*history[:at], corrected, *history[at + 1 :]]


def find_questions(history: Chat) -> list[int]:
    """Return the indices of the chat's questions."""
    return [index for index, message in enumerate(history) if message["role"] == "user"]


def find_answer(history: Chat) -> int | None:
    """Return the index of the answer to the last question; None if it has none."""
    asked = find_questions(history)
    for index in range(asked[-1] + 1 if asked else 0, len(history)):
        if read_id(history[index]) not in (None, _NOTE):
            return index
    return None


def find_answer_id(history: Chat) -> str | None:
    """Return the id of the answer to the last question; None if it has none."""
    at = find_answer(history)
    return None if at is None else read_id(history[at])


def read_id(message: dict[str, Any]) -> str | None:
    """Return the id of an answer, or the mark of a note."""
    name = (message.get("metadata") or {}).get("id")
    return str(name) if name else None


def is_question(history: Chat) -> bool:
    """Whether the chat ends with a question."""
    return bool(history) and history[-1]["role"] == "user"


def read_history(history: Chat, *, image_mode: ImageMode = "default") -> tuple[Message, ...]:
    """Return a chat's conversation up to its last question, with images ready to be sent.

    Raises:
        ImageError: a file is not an image.
    """
    turns: list[Message] = []
    asked: list[TextPart | ImagePart] = []
    for message in history:
        if message["role"] == "user":
            asked += [_read_part(part, image_mode) for part in message["content"]]
            continue
        if read_id(message) != _NOTE:
            text = "".join(part["text"] for part in message["content"])
            turns += [Message("user", tuple(asked)), Message("assistant", (TextPart(text),))]
        asked = []
    return (*turns, Message("user", tuple(asked))) if asked else tuple(turns)


def describe_figures(last: Chunk | None, seconds: float) -> str:
    """Return the line under an answer: tokens and seconds."""
    if last is None:
        return f"{seconds:.1f} s"
    cut = ", cut at max new tokens" if last.finish_reason == "length" else ""
    return (
        f"{last.num_tokens} tokens{cut} · {seconds:.1f} s · {last.num_prompt_tokens} in the prompt"
    )


def note(text: str, *, kind: str = "figures") -> dict[str, Any]:
    """Return a note: a message of the page itself, in small print."""
    content = f'<small class="{kind}">{html.escape(text)}</small>'
    return {"role": "assistant", "content": content, "metadata": {"id": _NOTE}}


def show_error(error: LlavaRayError) -> dict[str, Any]:
    """Return an error as a note."""
    return note(f"⚠ {error.message}", kind="error")


def _read_part(part: Any, image_mode: ImageMode) -> TextPart | ImagePart:
    if part["type"] == "text":
        return TextPart(part["text"])
    path = Path(part["file"]["path"])
    data = prepare_image(path.read_bytes(), name=path.name, mode=image_mode)
    return ImagePart(data, param=path.name)
