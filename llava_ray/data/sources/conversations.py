"""Rows that hold finished conversations, in the forms of several tools.

    conversations   [{"from": "human" | "gpt", "value"}], LLaVA and ShareGPT
    messages        [{"role", "content": text or parts}], OpenAI and TRL
    texts           [{"user", "assistant"}], The Cauldron
    prompt and response or completion, query and response, instruction (, input) and output,
    question and answer (s)
    text or caption the description of an image

In a text, each `<image>` stands for the next image of the row. Parts may hold images of their own.
A field `system` is the system message, and `history` holds earlier turns. What a sample cannot
express (tools, videos, messages that are not to be learned) rejects the row.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llava_ray.data.sources.building import (
    RawRow,
    Row,
    choose,
    make_sample,
    make_turns,
    most_frequent,
    read_id,
    read_text,
    write_message,
)
from llava_ray.data.sources.image_fields import check_unread, list_images
from llava_ray.data.sources.messages import read_turns, refuse_fields
from llava_ray.data.sources.readers import list_fields
from llava_ray.data.sources.row_files import read_rows
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import Folder
from llava_ray.template import IMAGE_TOKEN
from llava_ray.types import ImagePart, Message, Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

CAPTION_REQUESTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""LLaVA (Liu et al. 2023), table 11."""

PAIRS = (
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "answers"),
)
"""Fields of a question and of its answer, as various tools call them."""

_TURNS = ("conversations", "conversation", "messages")
_UNUSABLE_FIELDS = {
    "tools": "descriptions of tools",
    "functions": "descriptions of functions",
    "video": "a video",
    "videos": "videos",
    "audio": "a recording",
    "audios": "recordings",
    "chosen": "a preferred answer",
    "rejected": "a rejected answer",
}


def read_conversations(
    folder: Folder, names: list[str], config: "ConvertConfig"
) -> Iterator[RawRow]:
    """Yield the rows of all `.json` and `.jsonl` files."""
    files = [name for name in names if name.lower().endswith((".json", ".jsonl"))]
    if not files:
        raise ConfigError(_explain_files(folder, names))
    for name in files:
        yield from read_rows(folder, name)


def convert_llava(row: Row) -> Sample:
    """Return the sample of a row in LLaVA's format.

    An answer before the first question is left out, as in LLaVA's trainer.
    """
    return convert_row(row, "llava")


def convert_sharegpt(row: Row) -> Sample:
    """Return the sample of a row in ShareGPT's format, with or without images."""
    return convert_row(row, "sharegpt")


def convert_openai(row: Row) -> Sample:
    """Return the sample of a row of OpenAI messages."""
    return convert_row(row, "openai")


def convert_row(row: Row, source: str, *, images: Sequence[bytes | str] | None = None) -> Sample:
    """Return the sample of a row in any form that this module knows.

    Args:
        row: the fields.
        source: the name of the source.
        images: the row's images; None: they are in its fields.

    Raises:
        SampleError: the row has no conversation, or one that a sample cannot express.
    """
    refuse_fields(row, _UNUSABLE_FIELDS, "the row")
    row_images = list_images(row) if images is None else list(images)
    if not row_images:
        check_unread(row)
    messages, inline = _read_messages(row, num_images=len(row_images))
    messages = [*_read_system(row, messages), *messages]
    placed = _place_images(row_images, inline)
    return make_sample(source, read_id(row), messages, *placed)


def _read_messages(row: Row, *, num_images: int) -> tuple[list[Message], list[bytes | str | None]]:
    """Return a row's messages, and for each image in them its content; None: the row's next one."""
    given = [name for name in _TURNS if row.get(name) is not None]
    for name in [name for name in given if row[name]] or given:
        return read_turns(row[name], name)
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return read_turns([*row["prompt"], *row["completion"]], "prompt and completion")
    turns = _read_pairs(row, num_images=num_images)
    has_places = any(IMAGE_TOKEN in question for question, _ in turns)
    messages = list(make_turns(turns, num_images=0 if has_places else num_images))
    return messages, [None] * sum(_count_images(message) for message in messages)


def _read_system(row: Row, messages: Sequence[Message]) -> list[Message]:
    """Return the message of a row's `system` field, if it is not among the messages already."""
    if not row.get("system"):
        return []
    message = write_message("system", read_text(row["system"], "system"))
    if messages and messages[0].role == "system":
        if messages[0] == message:
            return []
        raise SampleError(
            "the row has a system field and another system message: keep one", reason="roles"
        )
    return [message]


def _read_pairs(row: Row, *, num_images: int) -> list[tuple[str, str]]:
    """Return the questions and answers of a row that has no list of messages."""
    if row.get("texts"):
        return [(turn["user"], turn["assistant"]) for turn in row["texts"]]
    for question, answer in PAIRS:
        if row.get(question) is not None and row.get(answer) is not None:
            asked = read_text(row[question], question)
            if question == "instruction" and row.get("input"):
                asked = f"{asked}\n{read_text(row['input'], 'input')}"
            return [*_read_history(row), (asked, _read_answer(row[answer], answer))]
    for name in ("text", "caption"):
        if row.get(name) is not None:
            if not num_images:
                raise SampleError(
                    f"the row has a {name} and no image: give the image, or name the {name} as an "
                    "answer beside a question",
                    reason="bad_row",
                )
            request = CAPTION_REQUESTS[choose(read_id(row), len(CAPTION_REQUESTS))]
            return [(request, read_text(row[name], name).strip())]
    raise SampleError(
        f"no conversation is known among the fields {list_fields(row)}: name it conversations, "
        f"messages, texts, text or caption, or {', '.join(' and '.join(pair) for pair in PAIRS)}",
        reason="bad_row",
    )


def _read_history(row: Row) -> list[tuple[str, str]]:
    return [(asked, answered) for asked, answered in row.get("history") or ()]


def _read_answer(answer: Any, name: str) -> str:
    """Return an answer; of a list, with or without objects, the most frequent one."""
    if isinstance(answer, list | tuple):
        return most_frequent(
            [found["answer"] if isinstance(found, dict) else found for found in answer]
        )
    return read_text(answer, name)


def _place_images(
    row_images: Sequence[bytes | str], inline: Sequence[bytes | str | None]
) -> list[bytes | str]:
    """Return all images in the order of their places in the text; those left over come last."""
    left = iter(row_images)
    placed = [next(left, None) if image is None else image for image in inline]
    return [image for image in placed if image is not None] + list(left)


def _count_images(message: Message) -> int:
    return sum(isinstance(part, ImagePart) for part in message.parts)


def _explain_files(folder: Folder, names: Sequence[str]) -> str:
    endings = sorted({name.rpartition(".")[2].lower() for name in names if "." in name})
    hint = "give such a file"
    if {"parquet", "arrow"} & set(endings):
        hint = "use the source hf for Parquet and Arrow files"
    elif {"tar", "tgz"} & set(endings):
        hint = "use the source webdataset for tar files"
    elif {"gz", "zip", "bz2", "xz", "zst"} & set(endings):
        hint = "unpack the files first"
    elif {"csv", "tsv", "xlsx"} & set(endings):
        hint = "write the table's rows as JSON lines"
    found = f", only {', '.join(endings[:5])}" if endings else ""
    return f"there is no .json or .jsonl in {folder.address!r}{found}: {hint}"
