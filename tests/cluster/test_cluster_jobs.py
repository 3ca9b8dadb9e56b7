"""Jobs whose cluster loses a machine: they complete by themselves, with the same result.

The cluster has a head without CPUs for work and two machines with room for one actor or training
worker each, so that lost work cannot move to the other machine. `TEST_CLUSTER=1 pytest -m cluster`.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    _AutoscalingCoordinatorActor,
)

from tests.support.ray_nodes import ROOT, RayNode, RayNodes, start_nodes, wait_for
from tests.support.scene_benchmark import write_scenes
from tests.support.train_runs import (
    NUM_SAMPLES,
    assert_same_run,
    make_config,
    read_steps,
    write_rows,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="wants the whole machine"),
]

NUM_QUESTIONS = 60
RUNS = ("disturbed", "undisturbed")


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with start_nodes(num_workers=0, OMP_NUM_THREADS="1") as nodes:
        yield nodes


@pytest.fixture
def whole(nodes: RayNodes) -> RayNodes:
    """The cluster, with two machines again if a test has killed one."""
    while (num_nodes := nodes.count_nodes()) < 3:
        nodes.add_worker(num_cpus=1)
        wait_for(lambda before=num_nodes: nodes.count_nodes() > before, 60)
    return nodes


def submit(nodes: RayNodes, script: str, *words: str) -> str:
    """Run a job until it ends; return its output."""
    command = (sys.executable, str(ROOT / "jobs" / script), *words)
    done = nodes.run_ray("job", "submit", "--address", nodes.dashboard, "--", *command)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def lose_machine(
    nodes: RayNodes,
    job: Callable[[], str],
    is_time: Callable[[], bool],
    then: Callable[[], Any] = lambda: None,
) -> None:
    """Kill a machine that works for a running job, and wait until the job ends."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job)
        wait_for(lambda: running.done() or is_time(), 180, lambda: "it is not time yet")
        assert not running.done(), running.result()
        victim = next(node for node in nodes.nodes[1:] if find_worker(node))
        victim.kill()
        killed_at = time.monotonic()
        then()
        running.result()
    print(f"over {time.monotonic() - killed_at:.1f} s after a machine was lost")


def find_worker(node: RayNode) -> psutil.Process | None:
    """Return the process of a machine's evaluation actor or training worker, if it has one."""
    for pid in node.list_alive():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            name = " ".join(process.cmdline())
            if "MapWorker" in name or "RayTrainWorker" in name:
                return process
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation_whose_machine_dies_has_every_response_once_and_the_same_score(
    whole: RayNodes, tmp_path: Path
) -> None:
    data = write_scenes(tmp_path / "data", num_scenes=10)

    def evaluate(output: Path) -> str:
        options = {"tasks": "own_exact", "data": data, "output": output, "num-actors": 2}
        # One by one, so that no response depends on what is computed beside it.
        options |= {"num-cpus": 1, "concurrency": 1, "limit": NUM_QUESTIONS}
        words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
        return submit(whole, "evaluate.py", *words)

    evaluate(tmp_path / "undisturbed")
    log = tmp_path / "disturbed" / "predictions_own_exact.jsonl"
    lose_machine(
        whole,
        lambda: evaluate(tmp_path / "disturbed"),
        lambda: log.exists() and log.read_text().count("\n") >= NUM_QUESTIONS // 4,
    )
    assert len(read_lines(log)) == NUM_QUESTIONS
    told, expected = (read_lines(tmp_path / name / "samples_own_exact.jsonl") for name in RUNS)
    assert [line["id"] for line in told] == [line["id"] for line in expected]
    assert [line["response"] for line in told] == [line["response"] for line in expected]
    scores = [json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in RUNS]
    assert scores[0]["own_exact"] == scores[1]["own_exact"]


@pytest.fixture(scope="module")
def shards(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    nodes.add_worker(num_cpus=1)
    raw = tmp_path_factory.mktemp("raw")
    words = ("--input", write_rows(raw), "--images", raw, "--output", raw / "shards")
    submit(nodes, "convert.py", "llava", *map(str, words))
    return raw / "shards"


def train(nodes: RayNodes, shards: Path, output: Path, **settings: Any) -> str:
    """Run 18 steps of training on two machines, with a checkpoint after every third."""
    config = make_config(shards, output, cpus_per_worker=1, num_readers=1, **settings)
    file = output / "run.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    return submit(nodes, "train.py", str(file))


@pytest.fixture(scope="module")
def undisturbed(nodes: RayNodes, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run, on one machine, which gives the same losses."""
    output = tmp_path_factory.mktemp("undisturbed")
    train(nodes, shards, output, num_workers=1)
    return output / "run"


@pytest.mark.parametrize("comes_back", [False, True], ids=["none comes", "another comes"])
def test_a_training_whose_machine_dies_has_the_same_losses_and_sees_each_sample_once(
    undisturbed: Path, whole: RayNodes, shards: Path, tmp_path: Path, comes_back: bool
) -> None:
    lose_machine(
        whole,
        lambda: train(whole, shards, tmp_path, min_workers=None if comes_back else 1),
        lambda: find_progress(tmp_path / "run") is not None,
        lambda: whole.add_worker(num_cpus=1) if comes_back else None,
    )
    assert_same_run(tmp_path / "run", undisturbed)
    assert_each_sample_once_an_epoch(tmp_path / "run", num_epochs=3)
    progress = find_progress(tmp_path / "run")
    assert progress
    assert (progress["step"], progress["num_workers"]) == (18, 2 if comes_back else 1)


def test_a_training_that_was_left_with_one_worker_takes_a_second_when_a_machine_comes(
    whole: RayNodes, shards: Path, tmp_path: Path
) -> None:
    # Small steps, which do not make more of what rounds apart.
    long = {"num_train_epochs": 30, "save_steps": 10, "learning_rate": 1e-5}
    plain, lost = tmp_path / "plain", tmp_path / "lost"
    plain.mkdir()
    lost.mkdir()
    run = lost / "run"
    train(whole, shards, plain, num_workers=1, **long)

    def counts(num_workers: int) -> bool:
        return (find_progress(run) or {}).get("num_workers") == num_workers

    def come() -> None:
        """Add a machine; the worker is stopped until Ray knows it, so that few steps are enough."""
        wait_for(lambda: counts(1), 120, lambda: "nothing goes on with one worker")
        (worker,) = filter(None, map(find_worker, whole.nodes[1:]))
        worker.suspend()
        before = whole.count_nodes()
        whole.add_worker(num_cpus=1)
        wait_for(lambda: whole.count_nodes() > before, 60)
        there_at = time.monotonic()
        time.sleep(_AutoscalingCoordinatorActor.TICK_INTERVAL_S)  # it counts machines as often
        worker.resume()
        wait_for(lambda: counts(2), 120, lambda: "it does not take the second")
        passed_s = time.monotonic() - there_at
        print(f"two workers had a checkpoint {passed_s:.1f} s after Ray had the machine")

    lose_machine(
        whole,
        lambda: train(whole, shards, lost, min_workers=1, grow_every_s=2, **long),
        lambda: counts(2),
        come,
    )
    assert_same_run(run, plain / "run")
    assert_each_sample_once_an_epoch(run, num_epochs=30)
    assert counts(2)


def find_progress(run: Path) -> dict[str, Any] | None:
    """Return the progress stored in the checkpoint from which Ray would resume, if there is one."""
    snapshot = run / "checkpoint_manager_snapshot.json"
    names = re.findall(r"checkpoint-(\d+)", snapshot.read_text()) if snapshot.exists() else []
    with suppress(FileNotFoundError):  # a later one may have taken its place in this moment
        latest = run / f"checkpoint-{max(map(int, names), default=0)}"
        return json.loads((latest / "progress.json").read_text())
    return None


def assert_each_sample_once_an_epoch(run: Path, *, num_epochs: int) -> None:
    ids = [id_ for line in read_steps(run) for id_ in line["sample_ids"]]
    assert len(ids) == num_epochs * NUM_SAMPLES
    for epoch in range(num_epochs):
        seen = ids[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]
        assert sorted(seen) == sorted(f"s{number}" for number in range(NUM_SAMPLES))
