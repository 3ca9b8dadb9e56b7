"""The log of conversations and votes is valid training data."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from llava_ray.errors import ConfigError
from llava_ray.serve.page.feedback import FeedbackLog, build_record, read_feedback
from llava_ray.types import Chunk, ImagePart, Message, Sampling, TextPart


def png(colour: str) -> ImagePart:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return ImagePart(file.getvalue())


def log_answer(log: FeedbackLog, answer_id: str, *parts: TextPart | ImagePart) -> None:
    asked = (Message("user", parts),)
    details = {"model": "echo", "sampling": Sampling(9, 0.2, 0.7), "seconds": 1.5}
    log.write_answer(answer_id, asked, "Yes.", last=Chunk("", "stop", 3, 7, 1), **details)


def test_a_conversation_is_a_sample_in_llavas_format() -> None:
    red, blue = png("red"), png("blue")
    asked = (
        Message("user", (red, TextPart("One <image>?"))),
        Message("assistant", (TextPart("One."),)),
        Message("user", (red, blue, TextPart("And now?"))),
    )
    row, images = build_record("7", asked, "Three.")
    assert row["conversations"] == [
        {"from": "human", "value": "<image>\nOne < image >?"},
        {"from": "gpt", "value": "One."},
        {"from": "human", "value": "<image>\n<image>\nAnd now?"},
        {"from": "gpt", "value": "Three."},
    ]
    assert len(row["image"]) == 3
    assert row["image"][0] == row["image"][1]
    assert set(images) == set(row["image"])


def test_votes_flags_and_corrections_join_their_answer(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path)
    log_answer(log, "a", png("red"), TextPart("Red?"))
    log_answer(log, "b", TextPart("Blue?"))
    log.write_vote("a", "up")
    log.write_vote("a", "flag")
    log.write_vote("a", "down")
    log.write_correction("a", (Message("user", (png("red"), TextPart("Red?"))),), "No.", "echo")
    with (tmp_path / "votes.jsonl").open("a") as votes:
        votes.write('{"answer": "b", "vo')  # the power failed
    first, second = read_feedback(tmp_path)
    assert (first["vote"], first["flag"], first["corrected"]) == ("down", True, "No.")
    assert (first["model"], first["num_tokens"], first["temperature"]) == ("echo", 3, 0.2)
    assert (second["vote"], second["flag"], second["corrected"]) == (None, False, None)
    assert "image" not in second


def test_an_image_is_stored_once_under_its_hash(tmp_path: Path) -> None:
    folder = tmp_path / "all" / "log"
    log = FeedbackLog(folder)
    for name in ("a", "b", "../../c"):
        log_answer(log, name, png("red"), TextPart("?"))
    (kept,) = (folder / "images").iterdir()
    assert kept.read_bytes() == png("red").data
    assert len(kept.stem) == 64
    assert [each.name for each in tmp_path.iterdir()] == ["all"]
    assert [each.name for each in folder.parent.iterdir()] == ["log"]


def test_visitors_at_the_same_moment_do_not_mix(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path)
    words = TextPart("word " * 5000)
    with ThreadPoolExecutor(8) as visitors:
        list(
            visitors.map(lambda number: log_answer(log, str(number), png("red"), words), range(80))
        )
    lines = (tmp_path / "conversations.jsonl").read_text().splitlines()
    assert sorted(int(json.loads(line)["id"]) for line in lines) == list(range(80))


def test_a_folder_that_cannot_be_written_to_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="set feedback_dir to a folder"):
        FeedbackLog(tmp_path / "file")
