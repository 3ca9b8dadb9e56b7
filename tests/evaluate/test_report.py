"""The results of a run can be inspected and compared with those of another run."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_ray.cli import app
from llava_ray.errors import ConfigError
from llava_ray.evaluate.rescore import score_file
from llava_ray.evaluate.results.compare import compare_runs
from llava_ray.evaluate.tasks import TASKS
from tests.support.benchmark_files import WRITERS, write_lines


def make_run(folder: Path, name: str, responses: list[str]) -> Path:
    """Score responses to POPE into a folder of results."""
    WRITERS["pope"](folder)
    rows = [{"question_id": i, "text": text} for i, text in enumerate(responses)]
    path = write_lines(folder / f"{name}.jsonl", rows)
    score_file(TASKS["pope"], path, folder, min_coverage=0.99, output=folder / name)
    return folder / name


RIGHT = ["yes", "no"] * 4


def test_the_report_is_one_file_with_images_of_the_worst_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", ["<b>yes</b>", "yes", *RIGHT[2:]])
    samples = [json.loads(line) for line in (run / "samples_pope.jsonl").read_text().splitlines()]
    page = (run / "report.html").read_text()
    assert "http" not in re.sub(r"data:image/jpeg;base64,[\w+/=]*", "", page)
    assert page.count("<article>") == sum(sample["score"] < 1 for sample in samples) == 1
    assert page.count("data:image/jpeg;base64,") == 1
    assert "<td>random/f1</td><td>80.00</td>" in page
    assert "8 of 8" in page
    (tmp_path / "pope" / "val2014" / "1.jpg").unlink()
    run = make_run(tmp_path, "again", ["yes", "<b>yes</b>", *RIGHT[2:]])
    assert "&lt;b&gt;yes&lt;/b&gt;" in (run / "report.html").read_text()


def test_results_of_several_tasks_gather_in_one_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", RIGHT)
    WRITERS["gqa"](tmp_path)
    path = write_lines(tmp_path / "gqa.jsonl", [{"question_id": "201", "text": "yes"}])
    score_file(TASKS["gqa"], path, tmp_path, min_coverage=0.99, output=run)
    results = json.loads((run / "results.json").read_text())["tasks"]
    assert results.keys() == {"pope", "gqa"}
    assert results["pope"]["headline"]["value"] == 100
    assert results["gqa"]["headline"] is None
    assert "no headline" in (run / "report.html").read_text()


def test_two_runs_are_compared_pair_by_pair(tmp_path: Path) -> None:
    before = make_run(tmp_path, "before", ["yes"] * 4 + RIGHT[4:])
    after = make_run(tmp_path, "after", ["no", *RIGHT[1:]])
    (task,) = compare_runs(before, after)
    number = task.numbers["accuracy"]
    assert (number.before, number.after, number.change.value) == (75, 87.5, 12.5)
    assert number.change.interval is not None
    assert number.change.interval[0] < 12.5 < number.change.interval[1]
    assert [pair.before.question.question_id for pair in task.flipped] == ["0", "1", "3"]
    assert (task.num_both, task.num_one) == (8, 0)
    (same,) = compare_runs(before, before)
    assert same.numbers["f1"].change[:2] == (0, 0)
    assert same.flipped == []


def test_only_questions_that_both_answered_are_compared(tmp_path: Path) -> None:
    before = make_run(tmp_path, "before", RIGHT)
    after = make_run(tmp_path, "after", RIGHT[:6])
    (task,) = compare_runs(before, after)
    assert (task.num_both, task.num_one) == (6, 2)
    assert task.numbers["accuracy"].before == 100


def test_the_command_shows_differences_and_flips(tmp_path: Path) -> None:
    runs = make_run(tmp_path, "before", RIGHT), make_run(tmp_path, "after", ["no", *RIGHT[1:]])
    wide = {"COLUMNS": "120"}
    run = CliRunner().invoke(app, ["evaluate", "compare", *map(str, runs)], env=wide)
    assert run.exit_code == 0, run.output
    assert "-12.50" in run.output
    assert "0: 1 -> 0  'yes' -> 'no'" in run.output


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", RIGHT)
    with pytest.raises(ConfigError, match="has no results"):
        compare_runs(run, tmp_path)
    other = make_run(tmp_path, "other", RIGHT)
    path = other / "samples_pope.jsonl"
    path.write_text(path.read_text().replace("dog 3", "cat 3"))
    with pytest.raises(ConfigError, match="question 3 is not the same in both runs"):
        compare_runs(run, other)
    path.rename(other / "samples_mme.jsonl")
    with pytest.raises(ConfigError, match="no task in common"):
        compare_runs(run, other)
