"""The Python face: a model in this process that chats about images, without a server.

LLaVA.chat -> llava_input -> ChatRequest -> engine.chat (in a thread of its own) -> text

The engine is the one that a server runs, so `chat_many` goes through its continuous batching. Its
event loop runs in a background thread: this works in scripts and in notebooks alike.
"""

import asyncio
import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Self, TypeVar, overload

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llava_ray.config import DEMO_MODEL, ModelConfig
from llava_ray.engine.chat import chat
from llava_ray.engine.factory import load_engine
from llava_ray.engine.protocol import Engine
from llava_ray.errors import ImageError, LlavaRayError, UserError
from llava_ray.llava_input import (
    CHAT_ARGUMENTS,
    LIMITS,
    ImageInput,
    read_conversation,
    read_item,
    read_sampling,
    split_options,
)
from llava_ray.types import ChatRequest, Chunk

_USUAL_BATCH = 64
"""Of an engine that chooses its own batch size: for how many questions images are read ahead."""

Result = TypeVar("Result")


class LLaVA:
    """A model in this process that chats about images.

        with LLaVA("demo") as model:
            print(model.chat("How many objects are there?", images=["scene.png"]))

    Methods may be called from several threads at once; their requests are computed together.

    Args:
        path: a folder, a hub name, an address that fsspec knows, or "demo" for the embedded model.
        options: those of `load_model` (base, vision_tower, dtype, device, quantization, attention,
            template) and the fields of `ModelConfig` (engine, adapters, context_length,
            max_batch_size, cache_tokens, ...), under the same names.

    Attributes:
        config: how the model is run.
        engine: what computes; see `llava_ray.engine.protocol`.

    Raises:
        ConfigError: an option is unknown or out of its bounds, or the model does not load.
    """

    def __init__(self, path: str | Path = DEMO_MODEL, **options: Any) -> None:
        self.config, loading = split_options(path, options)
        self._thread = _LoopThread()
        try:
            self.engine: Engine = self._thread.run(_load(self.config, loading))
        except BaseException:
            self._thread.stop()
            raise
        self._numbers = itertools.count()
        self._finalizer = weakref.finalize(self, _shut_down, self.engine, self._thread)

    def __repr__(self) -> str:
        closed = "" if self._finalizer.alive else ", closed"
        return f"LLaVA({self.config.path!r}, engine={self.config.engine!r}{closed})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what is running and free the model's memory; closing twice does nothing."""
        self._finalizer()

    @overload
    def chat(
        self,
        text: str = ...,
        images: ImageInput | Sequence[ImageInput] = ...,
        *,
        stream: Literal[False] = ...,
        history: Sequence[Any] = ...,
        system: str = ...,
        messages: Sequence[Any] = ...,
        adapter: str = ...,
        max_tokens: int | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] = ...,
        json_schema: Any = ...,
        **sampling: Any,
    ) -> str: ...

    @overload
    def chat(
        self,
        text: str = ...,
        images: ImageInput | Sequence[ImageInput] = ...,
        *,
        stream: Literal[True],
        history: Sequence[Any] = ...,
        system: str = ...,
        messages: Sequence[Any] = ...,
        adapter: str = ...,
        max_tokens: int | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] = ...,
        json_schema: Any = ...,
        **sampling: Any,
    ) -> Iterator[str]: ...

    def chat(
        self,
        text: str = "",
        images: ImageInput | Sequence[ImageInput] = (),
        *,
        stream: bool = False,
        history: Sequence[Any] = (),
        system: str = "",
        messages: Sequence[Any] = (),
        adapter: str = "",
        **sampling: Any,
    ) -> str | Iterator[str]:
        """Return the answer to a question; with `stream` an iterator of its pieces.

        Args:
            text: the question.
            images: one image or several; each is a path, bytes, a data URL or a PIL image. The
                model reads them before the text.
            stream: give each piece of the answer as soon as it is known. Closing the iterator
                stops the answer.
            history: earlier turns: pairs (question, answer), in which a question with images is
                (text, images); or messages as in the OpenAI API, {"role": ..., "content": ...}.
            system: the system prompt, in place of the template's own.
            messages: a whole conversation as in the OpenAI API, in place of `text`, `images`,
                `history` and `system`. Beside {"type": "text"} and {"type": "image_url"} a part
                may be {"type": "image", "image": ...}, of the kinds that `images` takes.
            adapter: the LoRA adapter that answers; see `ModelConfig.adapters`.
            sampling: fields of `llava_ray.types.Sampling`: max_tokens (512), temperature (0:
                greedy), top_p, seed, stop (a text or several), json_schema (a dict, JSON text or
                a pydantic model), num_logprobs, ...

        Raises:
            ImageError: a file is missing or is not an image; the message names it.
            RequestError: an option is unknown or out of its bounds, or the prompt does not fit
                into the model's context.
            UserError: the model is closed.
            EngineError: the engine broke.
        """
        asked = {
            "text": text,
            "images": images,
            "history": history,
            "system": system,
            "messages": messages,
            "adapter": adapter,
        }
        request = self._make_request(asked, sampling)
        if stream:
            return (chunk.text for chunk in self._iterate(request) if chunk.text)
        return self._thread.run(self._answer(request))

    def stream_chunks(
        self, text: str = "", images: ImageInput | Sequence[ImageInput] = (), **options: Any
    ) -> Iterator[Chunk]:
        """Yield an answer as the engine gives it: text, counts of tokens, log probabilities.

        Args:
            text: the question.
            images: as of `chat`.
            options: the other arguments of `chat`.

        Raises:
            LlavaRayError: as of `chat`.
        """
        asked = {name: options.pop(name) for name in CHAT_ARGUMENTS if name in options}
        return self._iterate(self._make_request({"text": text, "images": images, **asked}, options))

    @overload
    def chat_many(
        self,
        items: Sequence[Any],
        *,
        progress: bool = ...,
        errors: Literal["raise"] = ...,
        **_: Any,
    ) -> list[str]: ...

    @overload
    def chat_many(
        self, items: Sequence[Any], *, progress: bool = ..., errors: Literal["return"], **_: Any
    ) -> list[str | LlavaRayError]: ...

    def chat_many(
        self,
        items: Sequence[Any],
        *,
        progress: bool = True,
        errors: Literal["raise", "return"] = "raise",
        **sampling: Any,
    ) -> Any:
        """Return the answers to many questions, in their order; the engine batches them.

        Args:
            items: each is a text, a pair (text, images), or a dict of `chat`'s arguments.
            progress: show a progress bar on standard error.
            errors: "raise" stops at the first item that fails, and its error names the item;
                "return" puts the error in the place of the answer and goes on.
            sampling: as of `chat`, for all items; an item's own come first.

        Raises:
            LlavaRayError: as of `chat`; the message begins with `items[3]`, counted from 0.
        """
        questions = [read_item(item, i) for i, item in enumerate(items)]
        self._check_open()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        # As a terminal's even in a notebook, where rich would need ipywidgets.
        console = Console(stderr=True, force_jupyter=False)
        with Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not progress
        ) as bar:
            task = bar.add_task("answers", total=len(questions))
            answers = self._answer_many(
                questions,
                sampling,
                is_strict=errors == "raise",
                note_done=lambda: bar.advance(task),
            )
            return self._thread.run(answers)

    async def _answer_many(
        self,
        questions: Sequence[Mapping[str, Any]],
        sampling: Mapping[str, Any],
        *,
        is_strict: bool,
        note_done: Callable[[], None],
    ) -> list[str | LlavaRayError]:
        # No more images are in memory than keep the engine busy.
        size = self.config.max_batch_size
        gate = asyncio.Semaphore(2 * (_USUAL_BATCH if size == "auto" else size))

        async def answer(number: int, question: Mapping[str, Any]) -> str | LlavaRayError:
            async with gate:
                try:
                    asked = {name: question[name] for name in CHAT_ARGUMENTS if name in question}
                    own = {name: question[name] for name in question if name not in asked}
                    request = await asyncio.to_thread(
                        self._make_request, asked, {**sampling, **own}
                    )
                    return await self._answer(request)
                except LlavaRayError as error:
                    named = type(error)(f"items[{number}]: {error.message}", param=error.param)
                    if is_strict:
                        raise named from error
                    return named
                finally:
                    note_done()

        tasks = [asyncio.create_task(answer(*each)) for each in enumerate(questions)]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _answer(self, request: ChatRequest) -> str:
        async with aclosing(self._stream(request)) as chunks:
            return "".join([chunk.text async for chunk in chunks])

    async def _stream(self, request: ChatRequest) -> AsyncGenerator[Chunk]:
        try:
            async with aclosing(chat(self.engine, request, limits=LIMITS)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ImageError as error:
            raise type(error)(f"{error.param}: {error.message}", param=error.param) from error

    def _iterate(self, request: ChatRequest) -> Iterator[Chunk]:
        """Yield chunks that the background thread reads."""
        chunks: SimpleQueue[Chunk | BaseException | None] = SimpleQueue()

        async def read() -> None:
            try:
                async with aclosing(self._stream(request)) as stream:
                    async for chunk in stream:
                        chunks.put(chunk)
                chunks.put(None)
            except BaseException as error:
                chunks.put(error)
                raise

        self._check_open()
        reading = self._thread.start(read())
        try:
            while (item := chunks.get()) is not None:
                if isinstance(item, asyncio.CancelledError):
                    raise UserError("the model was closed before the answer ended")
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            reading.cancel()

    def _make_request(self, asked: Mapping[str, Any], sampling: Mapping[str, Any]) -> ChatRequest:
        self._check_open()
        return ChatRequest(
            f"python-{next(self._numbers)}",
            self.config.name,
            read_conversation(**asked),
            read_sampling(sampling),
            adapter=asked.get("adapter", ""),
        )

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise UserError(f"the model {self.config.path!r} is closed: load it again with LLaVA()")


class _LoopThread:
    """An event loop in a background thread, for callers that may have a loop of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llava", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> "asyncio.Future[Result] | Any":
        """Start a coroutine; return its `concurrent.futures.Future`."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Wait for a coroutine's result; Ctrl-C cancels it."""
        future = self.start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what still runs, and end the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=30)
            self._loop.close()

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        with suppress(RuntimeError):  # at the end of Python no thread can be started
            await self._loop.shutdown_default_executor()
        self._loop.stop()


async def _load(config: ModelConfig, loading: Mapping[str, Any]) -> Engine:
    """Load the engine in the thread of its event loop."""
    return load_engine(config, loading=loading)


def _shut_down(engine: Engine, thread: _LoopThread) -> None:
    """Close an engine and end its thread: on `close`, when the object goes, or when Python ends."""
    with suppress(RuntimeError):  # at the end of Python no thread can be started
        thread.run(engine.close())
    thread.stop()
