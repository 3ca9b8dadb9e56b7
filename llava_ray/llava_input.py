"""What `LLaVA` is given, read: the model's options, sampling, conversations and images.

Python values -> ModelConfig, Sampling, Message records. `llava.py` asks the engine with them.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from llava_ray import images as image_files
from llava_ray.config import LimitsConfig, ModelConfig, Section, refuse_unknown
from llava_ray.config.files import build_config
from llava_ray.errors import ConfigError, ImageError, RequestError
from llava_ray.types import ImagePart, Message, Role, Sampling, TextPart

ImageInput = str | Path | bytes | Image.Image
"""An image: the path of a file, a file's bytes, a data URL, or a PIL image."""

LIMITS = LimitsConfig(max_image_bytes=256 << 20, max_image_pixels=200_000_000)
"""A process's own images are trusted more than a stranger's; this still stops decompression
bombs."""

_LOADING = ("attention", "base", "vision_tower")
"""Options of `load_model` that are no fields of `ModelConfig`."""

CHAT_ARGUMENTS = ("adapter", "history", "images", "messages", "system", "text")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def split_options(
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
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = Field(None, ge=0, le=20)


def read_sampling(options: Mapping[str, Any]) -> Sampling:
    """Return checked sampling options as the engine takes them.

    Raises:
        RequestError: an option is unknown or out of its bounds.
    """
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


def read_item(item: Any, number: int) -> Mapping[str, Any]:
    """Return an item of `chat_many` as arguments of `chat`."""
    match item:
        case str():
            return {"text": item}
        case (str() as text, images):
            return {"text": text, "images": images}
        case Mapping():
            try:
                refuse_unknown(dict(item), [*CHAT_ARGUMENTS, *_SamplingSection.model_fields])
            except ValueError as error:
                raise RequestError(f"items[{number}]: {error}", param=f"items[{number}]") from error
            return item
        case _:
            raise RequestError(
                f"items[{number}] is a {type(item).__name__}: give a text, a pair (text, images) "
                "or a dict of chat's arguments",
                param=f"items[{number}]",
            )


def read_conversation(
    text: str = "",
    images: ImageInput | Sequence[ImageInput] = (),
    history: Sequence[Any] = (),
    system: str = "",
    messages: Sequence[Any] = (),
    adapter: str = "",
) -> tuple[Message, ...]:
    """Return the messages that the arguments of `LLaVA.chat` stand for.

    Raises:
        ImageError: a file is missing, or an image is a web address.
        RequestError: there is nothing to answer, or an argument is none of the kinds allowed.
    """
    given = [images] if isinstance(images, ImageInput) else list(images)
    if messages:
        if text or given or history or system:
            raise RequestError(
                "messages are a whole conversation: leave text, images, history and system out"
            )
        return tuple(_read_message(each) for each in messages)
    if not text and not given:
        raise RequestError("there is nothing to answer: give a text, or messages")
    conversation = [Message("system", (TextPart(system),))] if system else []
    for turn in history:
        conversation += _read_turn(turn)
    return (*conversation, _make_question(text, given))


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
            return ImagePart(image_files.decode_data_url(image, limits=LIMITS, param=param), param)
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
