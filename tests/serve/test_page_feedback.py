"""The page with a log and with moderation, over a scripted gateway."""

import shutil
from pathlib import Path

import pytest

from llava_ray.serve.page.feedback import read_feedback
from tests.support.local_page import (
    PARAMETERS,
    ScriptedGateway,
    Visitor,
    red_png,
    run_page,
    said,
    texts,
)

REFUSED = "the moderation service does not respond"


def test_answers_votes_and_comparisons_are_logged(tmp_path: Path) -> None:
    with run_page(ScriptedGateway(), feedback_dir=str(tmp_path)) as address:
        visitor = Visitor(address)
        red = visitor.upload("red.png", red_png())
        question = [said("What?", red)]
        *_, (left, right) = visitor.run(
            "answer", question, question, "echo", "other", True, *PARAMETERS
        )
        list(visitor.run("vote_up", left))
    first, second = sorted(read_feedback(tmp_path), key=lambda row: row["model"])
    assert (first["vote"], second["vote"]) == ("up", None)
    assert first["conversations"][0]["value"] == "<image>\nWhat?"
    assert first["conversations"][1]["value"].startswith("echo heard: What? (1 images)")
    assert (second["model"], second["image"]) == ("other", first["image"])
    assert [texts(chat)[1].split()[0] for chat in (left, right)] == ["echo", "other"]


def test_a_log_that_fails_is_told_and_the_chat_goes_on(tmp_path: Path) -> None:
    with run_page(ScriptedGateway(), feedback_dir=str(tmp_path / "log")) as address:
        shutil.rmtree(tmp_path / "log")
        shown = Visitor(address).answer([said("Hi")])[-1]
    assert "echo heard: Hi" in shown[1]
    assert "not recorded: No such file" in shown[-1]


def test_what_is_flagged_goes_to_no_model() -> None:
    gateway = ScriptedGateway()
    with run_page(gateway, moderation={"key": "sesame"}) as address:
        visitor = Visitor(address)
        red = visitor.upload("red.png", red_png())
        assert "flagged it (harassment)" in visitor.answer([said("nasty", red)])[-1][-1]
        assert gateway.bodies == []
        assert "heard: nice" in visitor.answer([said("nice", red)])[-1][1]
    kinds = sorted(asked["input"][0]["type"] for asked in gateway.moderated)
    assert kinds == ["image_url", "image_url", "text", "text"]
    assert {asked["key"] for asked in gateway.moderated} == {"Bearer sesame"}


@pytest.mark.parametrize("is_open", [False, True])
def test_without_a_verdict_the_configuration_decides(is_open: bool) -> None:
    down = {"url": "http://127.0.0.1:9", "allow_on_failure": is_open}
    with run_page(ScriptedGateway(), moderation=down) as address:
        shown = Visitor(address).answer([said("Hi")])[-1]
    assert any(REFUSED in text for text in shown) != is_open
    assert any("echo heard: Hi" in text for text in shown) == is_open
