"""Conversations that are written already: LLaVA's JSON, ShareGPT's, OpenAI's messages.

LLaVA: `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}`, with `<image>` in
the text for each image; a list in a JSON file, or JSON lines. ShareGPT is the same with more
names for who speaks. OpenAI: `{"messages": [{"role", "content": text or parts}]}`, one a line, with
images as `image_url` parts: data URLs or names in the folder of images.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llava_ray.config import LimitsConfig
from llava_ray.data.sources.building import RawRow, Row, make_sample, read_id, write_message
from llava_ray.data.sources.readers import read_json_lines, read_json_list
from llava_ray.errors import ConfigError, SampleError
from llava_ray.images import decode_data_url
from llava_ray.storage import Folder
from llava_ray.types import IMAGE, ImagePart, Message, Role, Sample, TextPart

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

_SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def read_conversations(
    folder: Folder, names: list[str], config: "ConvertConfig"
) -> Iterator[RawRow]:
    """Yield the rows of all `.json` and `.jsonl` files."""
    files = [name for name in names if name.lower().endswith((".json", ".jsonl"))]
    if not files:
        raise ConfigError(f"there is no .json or .jsonl in {folder.address!r}: give such a file")
    for name in files:
        is_list = name.lower().endswith(".json") and _begins_with_list(folder, name)
        yield from read_json_list(folder, name) if is_list else read_json_lines(folder, name)


def convert_llava(row: Row) -> Sample:
    """Return the sample of a row in LLaVA's format; see the module.

    An answer before the first question is left out, as LLaVA's trainer does.
    """
    return convert_turns(row, row["conversations"], "llava")


def convert_sharegpt(row: Row) -> Sample:
    """Return the sample of a row in ShareGPT's format, text alone or with images."""
    turns = row.get("conversations") or row["messages"]
    return convert_turns(row, turns, "sharegpt")


def convert_turns(row: Row, turns: Sequence[Row], source: str) -> Sample:
    """Return the sample of turns that are dictionaries with a speaker and a text."""
    messages = [_convert_turn(turn) for turn in turns]
    if messages and messages[0].role == "assistant":
        messages = messages[1:]
    return make_sample(source, read_id(row), messages, *_list_images(row))


def convert_openai(row: Row) -> Sample:
    """Return the sample of a row of OpenAI messages; see the module."""
    images = _list_images(row)
    messages: list[Message] = []
    for message in row["messages"]:
        content, role = message["content"], _read_speaker(message["role"])
        if isinstance(content, str):
            messages.append(write_message(role, content))
            continue
        parts = [_convert_part(part, images) for part in content]
        messages.append(Message(role, tuple(parts)))
    return make_sample("openai", read_id(row), messages, *images)


def _convert_turn(turn: Row) -> Message:
    speaker = turn.get("from") or turn["role"]
    text = turn["value"] if "value" in turn else turn["content"]
    return write_message(_read_speaker(speaker), text)


def _read_speaker(name: str) -> Role:
    if name not in _SPEAKERS:
        raise SampleError(
            f"{name!r} speaks: name each speaker one of {', '.join(_SPEAKERS)}", reason="roles"
        )
    return _SPEAKERS[name]


def _list_images(row: Row) -> list[bytes | str]:
    """Return a row's images, under whichever of the usual names they stand."""
    found = row.get("image") or row.get("images") or []
    found = found if isinstance(found, list) else [found]
    return [image["path"] if isinstance(image, dict) else image for image in found]


def _convert_part(part: Row, images: list[bytes | str]) -> TextPart | ImagePart:
    """Return a part of a message; the image of an `image_url` is added to `images`."""
    kind: str = part["type"]
    if kind in ("text", "input_text"):
        return TextPart(part["text"])
    if kind in ("image_url", "input_image"):
        images.append(_read_url(part["image_url"]))
        return IMAGE
    if kind == "image":
        if "image" in part:
            images.append(part["image"])
        return IMAGE
    raise SampleError(f"a part of a message is {kind!r}: only text and images are known")


def _read_url(url: Any) -> bytes | str:
    if isinstance(url, dict):
        url = url["url"]
    if url.startswith("data:"):
        return decode_data_url(url, limits=LimitsConfig(), param="image_url")
    if "://" in url:
        raise SampleError(
            f"the image {url[:80]!r} would have to be fetched: download it and name its file",
            reason="image_missing",
        )
    return url


def _begins_with_list(folder: Folder, name: str) -> bool:
    with folder.open(name) as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
