"""The log of conversations, votes and corrections, on which a model can be trained.

    folder/conversations.jsonl   one line for each complete answer, in LLaVA's training format
    folder/votes.jsonl           one line for each vote, flag or comparison, with the answer's id
    folder/images/<sha256>.png   each image once

A correction is a line of its own in `conversations.jsonl`, whose `corrects` is the answer's id.
Each line is a single write to a file opened for appending, so the lines of simultaneous visitors
are never mixed. File names are digests of the images, never a visitor's text.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llava_ray import images
from llava_ray.errors import ConfigError
from llava_ray.types import Chunk, ImagePart, Message, Sampling, TextPart

Vote = Literal["up", "down", "flag"]
Comparison = Literal["left", "right", "tie", "both bad"]

CONVERSATIONS = "conversations.jsonl"
VOTES = "votes.jsonl"
IMAGES = "images"


class Record(NamedTuple):
    """A conversation in LLaVA's training format, and the images that it names.

    Attributes:
        row: `id`, `image` (one name or several, in their order) and `conversations`.
        images: name -> encoded image.
    """

    row: dict[str, Any]
    images: dict[str, bytes]


def build_record(record_id: str, messages: tuple[Message, ...], answer: str = "") -> Record:
    """Return a conversation as a training sample.

    Args:
        record_id: the sample's id.
        messages: the conversation.
        answer: its last answer, if `messages` does not contain it.
    """
    names: list[str] = []
    files: dict[str, bytes] = {}
    turns = []
    for message in messages:
        if message.role == "system":
            continue
        words = "\n".join(part.text for part in message.parts if isinstance(part, TextPart))
        shown = [part.data for part in message.parts if isinstance(part, ImagePart)]
        for data in shown:
            names.append(name_image(data))
            files[names[-1]] = data
        role = "human" if message.role == "user" else "gpt"
        turns.append({"from": role, "value": "<image>\n" * len(shown) + _escape(words)})
    if answer:
        turns.append({"from": "gpt", "value": _escape(answer)})
    row: dict[str, Any] = {"id": record_id}
    if names:
        row["image"] = names[0] if len(names) == 1 else names
    return Record({**row, "conversations": turns}, files)


def name_image(data: bytes) -> str:
    """Return the path of an encoded image, relative to the folder of the log."""
    return f"{IMAGES}/{hashlib.sha256(data).hexdigest()}.{images.name_format(data)}"


class FeedbackLog:
    """Writes the log to one folder; all methods may be called from several threads at once.

    Args:
        folder: created if it does not exist.

    Raises:
        ConfigError: the folder is not writable.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser().absolute()
        try:
            (self._folder / IMAGES).mkdir(parents=True, exist_ok=True)
            for name in (CONVERSATIONS, VOTES):
                (self._folder / name).touch()
        except OSError as error:
            raise ConfigError(
                f"the log of conversations cannot be written to {str(folder)!r} ({error}): set "
                "feedback_dir to a folder that the server may write to, or leave it out"
            ) from error

    def write_answer(
        self,
        answer_id: str,
        messages: tuple[Message, ...],
        answer: str,
        *,
        model: str,
        sampling: Sampling,
        last: Chunk | None,
        seconds: float,
    ) -> None:
        """Log an answer and its conversation.

        Args:
            answer_id: the answer's id, which is also its request id at the gateway.
            messages: the conversation as it was sent.
            answer: the model's text.
            model: the model's name.
            sampling: the sampling settings.
            last: the last chunk, with the token counts.
            seconds: time that the answer took.

        Raises:
            OSError: the log could not be written.
        """
        details = {
            "model": model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "finish_reason": last.finish_reason if last else None,
            "num_tokens": last.num_tokens if last else None,
            "num_prompt_tokens": last.num_prompt_tokens if last else None,
            "seconds": round(seconds, 3),
            "request_id": answer_id,
        }
        self._write_record(build_record(answer_id, messages, answer), details)

    def write_correction(
        self, answer_id: str, messages: tuple[Message, ...], text: str, model: str
    ) -> None:
        """Log what an answer should have been. Raises: OSError."""
        record_id = f"{answer_id}-corrected-{time.time_ns()}"
        details = {"model": model, "corrects": answer_id}
        self._write_record(build_record(record_id, messages, text), details)

    def write_vote(self, answer_id: str, vote: Vote) -> None:
        """Log a visitor's vote on an answer; the last one counts. Raises: OSError."""
        self._append(VOTES, {"answer": answer_id, "vote": vote})

    def write_comparison(self, left_id: str, right_id: str, better: Comparison) -> None:
        """Log which of two answers to one question is better. Raises: OSError."""
        self._append(VOTES, {"left": left_id, "right": right_id, "better": better})

    def _write_record(self, record: Record, details: dict[str, Any]) -> None:
        for name, data in record.images.items():
            self._keep_image(self._folder / name, data)
        self._append(CONVERSATIONS, {**record.row, **details})

    def _keep_image(self, path: Path, data: bytes) -> None:
        if path.exists():
            return
        beside = path.with_name(f".{path.name}.{os.getpid()}.{time.time_ns()}")
        try:
            beside.write_bytes(data)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        line = json.dumps({**row, "time": round(time.time(), 3)}, ensure_ascii=False) + "\n"
        file = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            data = line.encode(errors="replace")
            if os.write(file, data) != len(data):
                raise OSError("the disk is full")
        finally:
            os.close(file)


def read_feedback(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the line of each logged answer, with `vote`, `flag` and `corrected` added.

    `vote` is the last vote ("up" or "down"), `flag` is true if the answer was ever flagged,
    `corrected` is the last corrected text. Incomplete lines, as after a power failure, are skipped.
    """
    votes: dict[str, str] = {}
    flags: set[str] = set()
    for row in _read_lines(Path(folder) / VOTES):
        if row.get("vote") == "flag":
            flags.add(row["answer"])
        elif "vote" in row:
            votes[row["answer"]] = row["vote"]
    rows = list(_read_lines(Path(folder) / CONVERSATIONS))
    corrected = {
        row["corrects"]: row["conversations"][-1]["value"] for row in rows if "corrects" in row
    }
    for row in rows:
        if "corrects" not in row:
            answer_id = row["id"]
            yield {
                **row,
                "vote": votes.get(answer_id),
                "flag": answer_id in flags,
                "corrected": corrected.get(answer_id),
            }


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _escape(text: str) -> str:
    """Escape image placeholders, so that no text of a visitor or a model stands for an image."""
    return text.replace("<image>", "< image >")
