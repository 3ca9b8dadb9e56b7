"""What the page's chat shows, and the conversation that it stands for.

    chat messages -> read_history -> Message ... Chunk -> stream_answer -> chat messages

Nothing else is kept: each turn is read back from the messages on the page. Notes (figures, errors)
carry a mark and are left out, and so is a question that got no answer. A chat message is a dict as
Gradio's Chatbot takes and gives it; Gradio itself is not needed here.
"""

import asyncio
import html
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from llava_ray.client import Client, shrink_picture
from llava_ray.errors import LlavaRayError
from llava_ray.types import ChatRequest, Chunk, ImagePart, Message, Sampling, TextPart

UPDATE_S = 0.05  # between two updates of the page; more often costs more than it shows
_NOTE = "note"


def ask(history: list[Any], text: str, paths: list[str]) -> list[Any]:
    """The chat with a question at its end: pictures first, as these models read them."""
    content: list[Any] = [{"path": path} for path in paths]
    if text.strip():
        content.append({"type": "text", "text": text.strip()})
    return [*history, {"role": "user", "content": content}] if content else history


def rewind(history: list[Any]) -> list[Any]:
    """The chat up to its last question, to be answered again."""
    asked = [index for index, message in enumerate(history) if message["role"] == "user"]
    return history[: asked[-1] + 1] if asked else []


async def stream_answer(
    url: str, model: str, history: list[Any], sampling: Sampling
) -> AsyncGenerator[list[Any]]:
    """Yield the messages to show after `history`, again and again as the answer grows."""
    started, shown, text = time.monotonic(), 0.0, ""
    last: Chunk | None = None
    try:
        messages = await asyncio.to_thread(read_history, history)
        request = ChatRequest(f"page-{uuid.uuid4().hex}", model, messages, sampling)
        async with Client(url) as client, aclosing(client.stream(request)) as chunks:
            async for last in chunks:
                text += last.text
                if time.monotonic() - shown > UPDATE_S:
                    yield _answer(text)
                    shown = time.monotonic()
    except LlavaRayError as error:
        yield [*_answer(text), show_error(error)]
    else:
        yield [*_answer(text), note(describe_figures(last, time.monotonic() - started))]


def read_history(history: list[Any]) -> tuple[Message, ...]:
    """The conversation that a chat shows, its pictures small enough to send.

    Raises:
        ImageError: a file is not a picture.
    """
    turns: list[Message] = []
    asked: list[TextPart | ImagePart] = []
    for message in history:
        if message["role"] == "user":
            asked += [_read_part(part) for part in message["content"]]
            continue
        if (message.get("metadata") or {}).get("id") != _NOTE:
            text = "".join(part["text"] for part in message["content"])
            turns += [Message("user", tuple(asked)), Message("assistant", (TextPart(text),))]
        asked = []
    return (*turns, Message("user", tuple(asked)))


def describe_figures(last: Chunk | None, seconds: float) -> str:
    """The line under an answer."""
    if last is None:
        return f"{seconds:.1f} s"
    cut = ", cut at max new tokens" if last.finish_reason == "length" else ""
    return (
        f"{last.num_tokens} tokens{cut} · {seconds:.1f} s · {last.num_prompt_tokens} in the prompt"
    )


def _read_part(part: Any) -> TextPart | ImagePart:
    if part["type"] == "text":
        return TextPart(part["text"])
    path = Path(part["file"]["path"])
    return ImagePart(shrink_picture(path.read_bytes(), name=path.name), param=path.name)


def _answer(text: str) -> list[Any]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}] if text else []


def note(text: str, *, kind: str = "figures") -> dict[str, Any]:
    content = f'<small class="{kind}">{html.escape(text)}</small>'
    return {"role": "assistant", "content": content, "metadata": {"id": _NOTE}}


def show_error(error: LlavaRayError) -> dict[str, Any]:
    return note(f"⚠ {error.message}", kind="error")
