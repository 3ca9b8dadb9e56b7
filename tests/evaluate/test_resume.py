"""A run whose processes are killed loses nothing: every question once, the same scores."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from llava_ray.config import EvaluateConfig
from llava_ray.evaluate import run
from llava_ray.evaluate.results.results import TaskResult
from tests.support.benchmark_files import write_lines
from tests.support.scripted_openai import ScriptedOpenAI

pytestmark = pytest.mark.ray

NUM_QUESTIONS = 40
NUM_BEFORE = 16  # asked before the kill
CONCURRENCY = 4


def answer(text: str) -> str:
    """Return the right answer to three of four questions."""
    return "wrong" if int(text.split()[1]) % 4 == 0 else text


def write_questions(folder: Path) -> Path:
    rows = [{"question_id": i, "text": f"say {i}", "answer": f"say {i}"} for i in range(1, 41)]
    write_lines(folder / "data" / "questions.jsonl", rows)
    return folder / "data"


def configure(folder: Path, server: ScriptedOpenAI) -> EvaluateConfig:
    return EvaluateConfig(
        tasks=["own_contains"],
        data=str(write_questions(folder)),
        output=str(folder / "out"),
        endpoint=server.url,
        reuse=True,
        num_cpus=0.1,
        concurrency=CONCURRENCY,
    )


def check(result: TaskResult, folder: Path) -> None:
    assert result.statuses == {"answered": NUM_QUESTIONS}
    assert result.headline is not None
    assert result.headline[1].value == 75
    lines = (folder / "out" / "samples_own_contains.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [str(i) for i in range(1, 41)]


def find_client(server: ScriptedOpenAI) -> int:
    """Return the process that has a connection to the server open."""
    port = int(server.url.rsplit(":")[-1].split("/")[0])
    (pid,) = {
        connection.pid
        for connection in psutil.net_connections("tcp4")
        if connection.raddr and connection.raddr.port == port and connection.pid
    }
    return pid


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_killed_actor_loses_no_rows(tmp_path: Path) -> None:
    killed: list[int] = []
    one_at_a_time = threading.Lock()

    def script(text: str) -> str:
        with one_at_a_time:
            if not killed and len(server.asked) > NUM_BEFORE:
                killed.append(find_client(server))
                os.kill(killed[0], signal.SIGKILL)
        return answer(text)

    with ScriptedOpenAI(script) as server:
        (result,) = run.evaluate_model(configure(tmp_path, server))
    assert killed != [os.getpid()]
    assert len(killed) == 1
    assert len(server.asked) > NUM_QUESTIONS  # those that died with the actor were asked again
    check(result, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_question_that_kills_its_actor_is_given_up_and_the_others_are_answered(
    tmp_path: Path,
) -> None:
    killed: list[int] = []
    one_at_a_time = threading.Lock()

    def script(text: str) -> str:
        with one_at_a_time:
            if text == "say 7":
                killed.append(find_client(server))
                os.kill(killed[-1], signal.SIGKILL)
        return answer(text)

    with ScriptedOpenAI(script) as server:
        (result,) = run.evaluate_model(configure(tmp_path, server))
    assert len(killed) == 2
    assert result.statuses == {"answered": NUM_QUESTIONS - 1, "failed": 1}
    assert any("actors crashed" in reason for reason in result.reasons)


@pytest.mark.usefixtures("cluster")
def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path) -> None:
    import ray

    log = tmp_path / "out" / "predictions_own_contains.jsonl"
    is_killed, is_time = threading.Event(), threading.Event()

    def script(text: str) -> str:
        if len(server.asked) > NUM_BEFORE and log.exists() and not is_killed.is_set():
            is_time.set()
            is_killed.wait(120)
        return answer(text)

    with ScriptedOpenAI(script) as server:
        config = configure(tmp_path, server)
        options = {"tasks": config.tasks[0], "data": config.data, "output": config.output}
        options |= {"endpoint": server.url, "num-cpus": "0.1", "concurrency": str(CONCURRENCY)}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        words.append("--reuse")
        driver = subprocess.Popen(
            [sys.executable, "-m", "llava_ray.cli", "evaluate", *words],
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert is_time.wait(240), driver.poll()
        driver.kill()
        driver.wait()
        known = {json.loads(line)["question_id"] for line in log.read_text().splitlines()}
        assert 0 < len(known) < NUM_QUESTIONS
        is_killed.set()
        num_before = len(server.asked)
        steps: list[run.EvaluateProgress] = []
        (result,) = run.evaluate_model(config, on_progress=steps.append)
    assert steps[0].num_done == len(known)
    asked = {body["messages"][-1]["content"].split()[1] for body in server.asked[num_before:]}
    assert not asked & known
    check(result, tmp_path)
