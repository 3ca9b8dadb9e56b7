"""Evaluation: scorers to the letter, files from elsewhere, and runs that resume."""

import json
from pathlib import Path

import pytest

from llava_ray.config import EvaluateConfig
from llava_ray.errors import ConfigError
from llava_ray.evaluate.scoring import judge, scorers
from llava_ray.evaluate.scoring.vqa_normalize import normalize_answer
from llava_ray.evaluate.tasks import find_tasks
from llava_ray.types import Question
from tests.support.benchmark_files import write_lines

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Two dogs.", "2 dogs"),
        ("The U.S.A.", "usa"),
        ("1,000", "1000"),
        ("3.5 feet", "3.5 feet"),
        ("dont know", "don't know"),
        ("somebody'd", "somebodyd"),
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("it's", "it 's"),
        ("none", "0"),
    ],
)
def test_an_answer_is_normalized_as_evalai_does(text: str, form: str) -> None:
    assert normalize_answer(text) == form


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("B", "B"),
        ("B. dog", "B"),
        ("So. The answer is B.", "B"),
        ("b", "FAILED"),
        ("Bdog", "FAILED"),
    ],
)
def test_scienceqa_reads_a_letter_as_the_original_does(text: str, parsed: str) -> None:
    question = Question("1", "?", answers=("B",), choices=("cat", "dog"))
    assert scorers.score_scienceqa(question, text).parsed == parsed
    assert scorers.score_scienceqa(question, "D").value == 0


def test_a_period_at_the_end_of_either_side_is_no_difference() -> None:
    for right in ("Yes.", "yes"):
        assert scorers.score_exact(Question("1", "?", answers=(right,)), "Yes.").value == 1


def test_vqa_accuracy_leaves_each_annotator_out_once() -> None:
    question = Question("1", "?", answers=("red",) * 3 + ("blue",) * 7)
    assert scorers.score_textvqa(question, "Red").value == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert scorers.score_vqa(question, "blue.").value == 1


def test_a_verdict_that_cannot_be_read_is_no_score() -> None:
    assert judge.score_review("8 7\nbecause").figures == (8, 7)
    assert judge.score_review("8,7.5\nbecause").figures == (8, 7.5)
    for verdict in ("both are fine", "", "8", "8 7 6", "8  7", "-1 -1"):
        assert judge.score_review(verdict).value is None
    assert judge.score_grading("0.5 ").value == 0.5
    for verdict in ("", "7", "good", "nan"):
        assert judge.score_grading(verdict).value is None


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean scienceqa"):
        find_tasks(["sciencqa"])


def make_own(folder: Path) -> Path:
    rows = [{"question_id": str(i), "text": f"say {i}", "answer": f"say {i}"} for i in range(20)]
    rows[3]["image"] = "absent.png"
    write_lines(folder / "data" / "questions.jsonl", rows)
    return folder / "data"


@pytest.mark.usefixtures("served")
def test_a_run_types_what_it_cannot_ask_and_asks_nothing_twice(tmp_path: Path) -> None:
    from llava_ray.evaluate import run

    def evaluate(**changes: object) -> list[tuple[int, int]]:
        steps: list[tuple[int, int]] = []
        settings = {"tasks": ["own_contains"], "data": str(make_own(tmp_path)), "engine": "echo"}
        settings |= {"output": str(tmp_path / "out"), "num_cpus": 0.1, "concurrency": 4}
        config = EvaluateConfig(**{**settings, **changes})
        (result,) = run.evaluate_model(config, on_progress=lambda p: steps.append(p[1:]))
        assert result.statuses == {"answered": 19, "refused": 1}
        assert result.headline is None
        assert result.metrics["accuracy"].value == 100
        assert any("absent.png" in reason for reason in result.reasons)
        return steps

    assert evaluate()[0] == (0, 20)
    log = tmp_path / "out" / "predictions_own_contains.jsonl"
    first = log.read_text()
    with log.open("a") as file:
        file.write('{"question_id": "7", "sta')  # a writer that was killed
    assert evaluate()[0] == (19, 20)
    assert log.read_text().startswith(first)
    samples = (tmp_path / "out" / "samples_own_contains.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in samples] == [str(i) for i in range(20)]


def test_the_three_paths_give_the_same_responses(served: str, tmp_path: Path) -> None:
    from llava_ray.evaluate import run

    responses = []
    for path in ({"engine": "echo"}, {"endpoint": served}, {"app": "app"}):
        output = tmp_path / next(iter(path))
        settings = {"tasks": ["own_contains"], "data": str(make_own(tmp_path)), "num_cpus": 0.1}
        config = EvaluateConfig(**settings, output=str(output), model_name="echo", **path)
        run.evaluate_model(config)
        lines = (output / "samples_own_contains.jsonl").read_text().splitlines()
        responses.append([(row["id"], row["response"]) for row in map(json.loads, lines)])
    assert responses[0] == responses[1] == responses[2]


@pytest.mark.usefixtures("cluster")
def test_a_model_that_does_not_load_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    from llava_ray.evaluate import run

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    config = EvaluateConfig(
        tasks=["own_contains"],
        data=str(make_own(tmp_path)),
        output=str(tmp_path / "out"),
        model=str(tmp_path / "model"),
        num_cpus=0.1,
    )
    with pytest.raises(ConfigError, match="model"):
        run.evaluate_model(config)
