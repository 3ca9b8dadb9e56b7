"""The Python face: a model in this process that chats about images, without a server.

LLaVA.chat -> Message records -> ChatRequest -> engine.chat (in a thread of its own) -> text

The engine is the one that a server runs, so `chat_many` goes through its continuous batching. Its
event loop runs in a background thread: this works in scripts and in notebooks alike.
"""

import asyncio
import io
import itertools
import json
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Self, TypeVar, overload

from PIL import Image
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llava_ray import images as image_files
from llava_ray.config import DEMO_MODEL, LimitsConfig, ModelConfig, Section, refuse_unknown
from llava_ray.config.files import build_config
from llava_ray.engine.chat import chat
from llava_ray.engine.factory import load_engine
from llava_ray.engine.protocol import Engine
from llava_ray.errors import ConfigError, ImageError, LlavaRayError, RequestError, UserError
from llava_ray.types import ChatRequest, Chunk, ImagePart, Message, Role, Sampling, TextPart

ImageInput = str | Path | bytes | Image.Image
"""An image: the path of a file, a file's bytes, a data URL, or a PIL image."""

_LIMITS = LimitsConfig(max_image_bytes=256 << 20, max_image_pixels=200_000_000)
"""A process's own images are trusted more than a stranger's; this still stops decompression
bombs."""

_LOADING = ("attention", "base", "vision_tower")
"""Options of `load_model` that are no fields of `ModelConfig`."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_ASKING = ("adapter", "history", "images", "messages", "system", "text")

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
        self.config, loading = _split_options(path, options)
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
        asked = {name: options.pop(name) for name in _ASKING if name in options}
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
        questions = [_read_item(item, i) for i, item in enumerate(items)]
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
        gate = asyncio.Semaphore(2 * self.config.max_batch_size)

        async def answer(number: int, question: Mapping[str, Any]) -> str | LlavaRayError:
            async with gate:
                try:
                    asked = {name: question[name] for name in _ASKING if name in question}
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
            async with aclosing(chat(self.engine, request, limits=_LIMITS)) as chunks:
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
            _read_conversation(**asked),
            _read_sampling(sampling),
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


def _split_options(
    path: str | Path, options: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Divide options into the engine's configuration and what `load_model` alone knows."""
    fields = {**dict.fromkeys(ModelConfig.model_fields), **ModelConfig.renamed}
    try:
        refuse_unknown(dict(options), [*fields, *_LOADING])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    options = dict(options)
    loading = {name: options.pop(name) for name in _LOADING if name in options}
    if options.get("quantization", "none") is None:
        options.pop("quantization")
    if options.get("quantization") in ("4bit", "8bit"):
        loading["quantization"] = options.pop("quantization")
    if "dtype" in options:  # load_model also takes torch's own, and "stored"
        options["dtype"] = str(options["dtype"]).removeprefix("torch.")
        if options["dtype"] == "stored":
            loading["dtype"] = options.pop("dtype")
    return build_config(ModelConfig, {**options, "path": str(path)}), loading


class _SamplingSection(Section):
    """What `chat` takes of `Sampling`, with its bounds."""

    max_tokens: int | None = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | tuple[str, ...] = ()
    json_schema: Any = None
    ignore_eos: bool = False
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = Field(None, ge=0, le=20)


def _read_sampling(options: Mapping[str, Any]) -> Sampling:
    try:
        checked = build_config(_SamplingSection, options)
    except ConfigError as error:
        raise RequestError(error.message) from error
    fields = dict(checked)
    if isinstance(checked.stop, str):
        fields["stop"] = (checked.stop,) if checked.stop else ()
    fields["logit_bias"] = tuple(checked.logit_bias.items())
    fields["json_schema"] = _read_schema(checked.json_schema)
    return Sampling(**fields)


def _read_schema(schema: Any) -> str | None:
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    return schema if schema is None or isinstance(schema, str) else json.dumps(schema)


def _read_item(item: Any, number: int) -> Mapping[str, Any]:
    """Return an item of `chat_many` as arguments of `chat`."""
    match item:
        case str():
            return {"text": item}
        case (str() as text, images):
            return {"text": text, "images": images}
        case Mapping():
            try:
                refuse_unknown(dict(item), [*_ASKING, *_SamplingSection.model_fields])
            except ValueError as error:
                raise RequestError(f"items[{number}]: {error}", param=f"items[{number}]") from error
            return item
        case _:
            raise RequestError(
                f"items[{number}] is a {type(item).__name__}: give a text, a pair (text, images) "
                "or a dict of chat's arguments",
                param=f"items[{number}]",
            )


def _read_conversation(
    text: str = "",
    images: ImageInput | Sequence[ImageInput] = (),
    history: Sequence[Any] = (),
    system: str = "",
    messages: Sequence[Any] = (),
    adapter: str = "",
) -> tuple[Message, ...]:
    pictures = [images] if isinstance(images, ImageInput) else list(images)
    if messages:
        if text or pictures or history or system:
            raise RequestError(
                "messages are a whole conversation: leave text, images, history and system out"
            )
        return tuple(_read_message(each) for each in messages)
    if not text and not pictures:
        raise RequestError("there is nothing to answer: give a text, or messages")
    conversation = [Message("system", (TextPart(system),))] if system else []
    for turn in history:
        conversation += _read_turn(turn)
    return (*conversation, _make_question(text, pictures))


def _read_turn(turn: Any) -> list[Message]:
    match turn:
        case Message() | Mapping():
            return [_read_message(turn)]
        case (str() | (str(), _) as question, str() as answer):
            asked = (question, ()) if isinstance(question, str) else question
            images = [asked[1]] if isinstance(asked[1], ImageInput) else asked[1]
            return [_make_question(asked[0], images), Message("assistant", (TextPart(answer),))]
        case _:
            raise RequestError(
                f"history holds a {type(turn).__name__}: give pairs (question, answer), or "
                'messages like {"role": "user", "content": "Hello"}'
            )


def _make_question(text: str, images: Sequence[ImageInput]) -> Message:
    parts = [_read_image(image, f"images[{i}]") for i, image in enumerate(images)]
    return Message("user", (*parts, *([TextPart(text)] if text else [])))


def _read_message(message: Any) -> Message:
    if isinstance(message, Message):
        return message
    roles: tuple[Role, ...] = ("system", "user", "assistant")
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in roles or "content" not in message:
        raise RequestError(
            f"not a message: {str(message)[:80]}; give "
            '{"role": "system", "user" or "assistant", "content": ...}'
        )
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    return Message(role, tuple(_read_part(part) for part in parts))


def _read_part(part: Any) -> TextPart | ImagePart:
    match part:
        case str():
            return TextPart(part)
        case {"type": "text", "text": str() as text}:
            return TextPart(text)
        case {"type": "image", "image": image}:
            return _read_image(image, "image")
        case {"type": "image_url", "image_url": {"url": url} | (str() as url)}:
            return _read_image(url, "image_url")
        case _:
            raise RequestError(
                f'not a part of a message: {str(part)[:80]}; give {{"type": "text", "text": ...}} '
                'or {"type": "image", "image": ...}'
            )


def _read_image(image: Any, param: str) -> ImagePart:
    """Return an image's encoded file; it is decoded later, when its request's turn comes.

    Raises:
        ImageError: the file cannot be read, or it is a web address.
    """
    match image:
        case Image.Image():
            if image.mode not in _PNG_MODES:
                image = image.convert("RGB")
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=1)
            return ImagePart(file.getvalue(), param)
        case bytes() | bytearray():
            return ImagePart(bytes(image), param)
        case str() if image.startswith("data:"):
            return ImagePart(image_files.decode_data_url(image, limits=_LIMITS, param=param), param)
        case str() if "://" in image:
            raise ImageError(
                f"{image[:80]!r}: images are not fetched from addresses here: download the file "
                "and give its path or its bytes",
                param=param,
            )
        case str() | Path():
            return ImagePart(_read_file(Path(image).expanduser()), str(image))
        case _:
            raise ImageError(
                f"{param} is a {type(image).__name__}: give a path, the file's bytes or a PIL "
                "image (PIL.Image.fromarray turns an array into one)",
                param=param,
            )


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"cannot read the image {str(path)!r} ({error.strerror}): give the path of a file",
            param=str(path),
        ) from error
