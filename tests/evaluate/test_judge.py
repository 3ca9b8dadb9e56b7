"""Responses are graded by a judge at a real server, whose verdicts may be missing or malformed."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llava_ray.config import EvaluateConfig
from llava_ray.errors import ConfigError
from llava_ray.evaluate.predict import ask
from llava_ray.evaluate.results.results import TaskResult, summarize_task
from llava_ray.evaluate.scoring.judge_run import grade_predictions
from llava_ray.evaluate.tasks import TASKS
from llava_ray.types import Prediction
from tests.support.benchmark_files import WRITERS
from tests.support.raw_data import write_json
from tests.support.scripted_openai import Script, ScriptedOpenAI

RULES = {
    f"llava_bench_{kind}": {"role": "Assistant", "prompt": f"Judge this {kind}."}
    for kind in ("conv", "detail", "complex")
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "FIRST_PAUSE_S", 0.001)


def grade(name: str, folder: Path, script: Script | None, **settings: Any) -> tuple[Any, Any, Any]:
    """Grade the same response to every question; return the server, the scores and the result."""
    task = TASKS[name]
    WRITERS[task.folder](folder)
    questions = task.read_all(folder)
    said = {q.question_id: Prediction(q.question_id, "answered", "A mountain.") for q in questions}
    with ScriptedOpenAI(script or (lambda _: 500)) as server:
        settings |= {"judge_endpoint": server.url} if script else {}
        config = EvaluateConfig(tasks=[name], data=str(folder), output=str(folder), **settings)
        assert task.judge is not None
        log = folder / "verdicts.jsonl"
        scores = grade_predictions(task.judge, questions, said, config, log)
    return server, scores, summarize_task(task, questions, said, scores, min_coverage=0.99)


def test_a_judge_reads_the_image_in_words_and_both_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    server, scores, result = grade(
        "llava_in_the_wild", tmp_path, lambda _: "8 6\nBecause.", judge_model="scripted"
    )
    asked = sorted(body["messages"][-1]["content"] for body in server.asked)
    assert asked[0].startswith(
        "[Context]\nA hill.\n\n[Question]\nWhy 0?\n\n[Assistant 1]\nBecause 0.\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\nA mountain.\n\n[End of Assistant 2]\n\n[System]\n"
    )
    assert {(body["model"], body["temperature"]) for body in server.asked} == {("scripted", 0.2)}
    assert set(server.keys) == {"Bearer sesame"}
    assert [score.figures for score in scores.values()] == [(8, 6)] * 3
    assert result.headline[1].value == 75


def test_llavas_own_rules_can_be_given(tmp_path: Path) -> None:
    write_json(tmp_path / "rule.json", RULES)
    wording = {"judge_wording": str(tmp_path / "rule.json")}
    server, _, _ = grade("llava_in_the_wild", tmp_path, lambda _: "8 6", **wording)
    asked = [body["messages"][-1]["content"] for body in server.asked]
    assert sum("[System]\nJudge this detail.\n\n" in text for text in asked) == 1
    write_json(tmp_path / "rule.json", {"llava_bench_conv": RULES["llava_bench_conv"]})
    with pytest.raises(ConfigError, match="has no 'llava_bench_detail'"):
        grade("llava_in_the_wild", tmp_path, lambda _: "8 6", **wording)
    with pytest.raises(ConfigError, match="cannot be read"):
        grade("llava_in_the_wild", tmp_path, lambda _: "8 6", judge_wording="absent.json")


def test_mm_vet_is_graded_from_0_to_1(tmp_path: Path) -> None:
    server, _, result = grade(
        "mmvet", tmp_path, lambda text: "0.6" if "What is 0?" in text else "1"
    )
    asked = sorted(body["messages"][-1]["content"] for body in server.asked)
    assert asked[0].endswith("\nWhat is 0? | dog <AND> cat | A mountain. | ")
    assert result.metrics["accuracy"].value == pytest.approx(80)
    assert result.metrics["know/accuracy"].value == pytest.approx(60)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (400, "the judge failed: .*the script says no"),
        (503, "the judge failed: .*the script says no"),
        (None, "the judge failed: "),
        ("Both are fine.", "the judge gave no two numbers"),
    ],
)
def test_a_judge_that_fails_is_reported_and_never_averaged_in(
    tmp_path: Path, fault: Any, reason: str
) -> None:
    def script(text: str) -> Any:
        return fault if "Why 1?" in text else "10 5"

    _, _, result = grade("llava_in_the_wild", tmp_path, script)
    assert result.statuses == {"answered": 2, "unjudged": 1}
    assert result.headline is None
    assert result.metrics["ratio"].value == 50
    (said,) = result.reasons
    assert re.match(reason, said)


def test_a_verdict_is_asked_for_once_and_a_failure_again(tmp_path: Path) -> None:
    server, _, _ = grade("mmvet", tmp_path, lambda text: 400 if "What is 1?" in text else "1")
    assert len(server.asked) == 2
    endpoint = {"judge_endpoint": server.url}
    log = tmp_path / "verdicts.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(row["reason"][:16] for row in rows) == ["", "the judge failed"]
    with log.open("a") as file:
        file.write('{"question_id": "1", "te')  # a writer that was killed
    task = TASKS["mmvet"]
    questions = task.read_all(tmp_path)
    said = {q.question_id: Prediction(q.question_id, "answered", "A mountain.") for q in questions}
    config = EvaluateConfig(tasks=["mmvet"], data=str(tmp_path), output=str(tmp_path), **endpoint)
    assert task.judge is not None
    progress: list[tuple[int, int]] = []
    # nobody answers there any more: the verdict that is there is kept, the other one fails
    scores = grade_predictions(
        task.judge, questions, said, config, log, on_verdict=lambda *step: progress.append(step)
    )
    assert progress == [(1, 2), (2, 2)]
    assert scores["0"].value == 1
    assert "no server answers" in scores["1"].why


def test_without_a_judge_responses_are_kept_and_nothing_is_scored(tmp_path: Path) -> None:
    _, _, result = grade("mmvet", tmp_path, None)
    assert isinstance(result, TaskResult)
    assert result.statuses == {"unjudged": 2}
    assert "--judge-endpoint" in next(iter(result.reasons))


def test_a_notebook_whose_loop_runs_already_can_ask_a_judge(tmp_path: Path) -> None:
    async def cell() -> None:
        server, _, result = grade("mmvet", tmp_path, lambda _: "1")
        assert result.num_scored == len(server.asked) == 2

    asyncio.run(cell())
