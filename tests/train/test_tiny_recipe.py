"""A small LLaVA end to end: pretraining, fine-tuning, held-out questions with and without images.

Uses the shipped recipes and the commands in their comments; `TEST_LONG=1 pytest -m long` runs it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ray.demo.evaluate import TARGETS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif("TEST_LONG" not in os.environ, reason="trains for minutes"),
]

ROOT = Path(__file__).parents[2]
ACCURACY = 0.75
"""Of exact answers to what the two stages teach: the kinds of question that have a target."""
GUESSED = 0.5
"""More than who sees nothing reaches, be it by knowing which answers are frequent."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the commands of the README have run, up to the evaluation."""
    place = tmp_path_factory.mktemp("tiny")
    raw = "outputs/tiny-raw"
    parts = ("--llm", f"{raw}/llm", "--vision-tower", f"{raw}/tower")
    run(place, "-m", "jobs.embedded_model", "raw", str(place / raw))
    run_cli(place, "build", "outputs/tiny-new", *parts)
    for name in ("captions", "conversations"):
        rows = ("--input", f"{raw}/{name}.json", "--images", f"{raw}/images")
        run_cli(place, "convert", "llava", *rows, "--output", f"outputs/tiny-{name}")
    for stage in ("pretrain", "finetune"):
        run(place, str(ROOT / "jobs" / "train.py"), f"tiny_{stage}")
    return place


def run_cli(place: Path, *words: str) -> None:
    run(place, "-m", "llava_ray.cli", *words)


def run(place: Path, *words: str) -> None:
    """Run Python as the README does.

    Raises:
        AssertionError: The command failed; the message holds the end of its output.
    """
    command = [sys.executable, *words]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}  # `jobs` is not installed
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_both_stages_end_with_a_model_that_sees(place: Path) -> None:
    words = ("--scenes", "25", "--write", "scores.json")
    run_cli(place, "demo", "evaluate", "outputs/tiny-finetune/export", *words)
    kinds = json.loads((place / "scores.json").read_text())["kinds"]
    scores = [kinds[kind] for kind in TARGETS]
    num_asked = sum(score["num_questions"] for score in scores)

    def average(name: str) -> float:
        return sum(score[name] * score["num_questions"] for score in scores) / num_asked

    assert average("exact") > ACCURACY
    assert average("blind") < GUESSED
    assert average("prior") < GUESSED
