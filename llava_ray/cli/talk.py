"""A conversation in the terminal: reads questions and images, prints answers as they come."""

import asyncio
import sys
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

from llava_ray.cli.console import notes, out, print_error
from llava_ray.client import shrink_image
from llava_ray.errors import ImageError, LlavaRayError
from llava_ray.types import ChatRequest, Chunk, ImagePart, Message, Sampling, TextPart

Answerer = Callable[[ChatRequest], AsyncGenerator[Chunk]]

COMMANDS = "/image PATH adds an image, /clear starts over, /quit leaves; Ctrl-C stops an answer"


class Talk:
    """A conversation in the terminal; a turn without an answer is forgotten."""

    def __init__(
        self, runner: asyncio.Runner, answer: Answerer, model: str, sampling: Sampling
    ) -> None:
        self._runner, self._answer, self._model, self._sampling = runner, answer, model, sampling
        self._turns: tuple[Message, ...] = ()

    def run(self, images: list[ImagePart]) -> None:
        """Read and answer until the end of the input."""
        notes.print(f"{self._model}: {_count(images)}. {COMMANDS}.", style="dim")
        while (line := _read_line()) is not None and line not in ("/quit", "/exit"):
            try:
                if line == "/clear":
                    self._turns, images = (), []
                    notes.print("a new conversation, without images", style="dim")
                elif line == "/image" or line.startswith("/image "):
                    images.append(read_image(Path(line.removeprefix("/image").strip())))
                    notes.print(_count(images), style="dim")
                elif line.startswith("/"):
                    notes.print(f"no such command: {line}; {COMMANDS}", markup=False)
                elif line and self.say(line, images):
                    images = []
            except LlavaRayError as error:
                print_error(error)

    def say(self, text: str, images: list[ImagePart]) -> bool:
        """Print the answer as it comes; return False if it was stopped before it began."""
        asked = Message("user", (*images, TextPart(text)))
        request = ChatRequest(
            f"cli-{uuid.uuid4().hex}", self._model, (*self._turns, asked), self._sampling
        )
        pieces: list[str] = []
        try:
            self._runner.run(self._print_answer(request, pieces))
        except KeyboardInterrupt:
            notes.print("(stopped)", style="dim")
        if not (answer := "".join(pieces)):
            return False
        self._turns = (*request.messages, Message("assistant", (TextPart(answer),)))
        return True

    async def _print_answer(self, request: ChatRequest, pieces: list[str]) -> None:
        try:
            async with aclosing(self._answer(request)) as chunks:
                async for chunk in chunks:
                    pieces.append(chunk.text)
                    out.print(chunk.text, end="", markup=False)
        finally:
            if pieces:
                out.print()


def read_image(path: Path) -> ImagePart:
    """Return an image's file, made small enough to send.

    Raises:
        ImageError: it cannot be read, or is no image.
    """
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {str(path)!r} ({error.strerror}): give a file") from error
    return ImagePart(shrink_image(data, name=str(path)), param=path.name)


def _read_line() -> str | None:
    """The next line, without blanks around it; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        notes.print(f"\n{COMMANDS}", style="dim")
        return ""


def _count(images: list[ImagePart]) -> str:
    return {0: "no image yet", 1: "1 image"}.get(len(images), f"{len(images)} images")
