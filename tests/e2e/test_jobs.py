"""`ray job submit` of the scripts in jobs/, as the README has them, on a cluster of their own."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest

from llava_ray.model import load_model
from llava_ray.train.checkpoint import read_progress
from tests.support.ray_nodes import ROOT, RayNodes, start_nodes, wait_for
from tests.support.tiny_checkpoint import make_image, tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_SAMPLES = 24


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    quickly = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}  # see conftest.py
    with start_nodes(num_workers=0, head_cpus=2, **quickly) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, conversations about them, and a recipe."""
    place = tmp_path_factory.mktemp("jobs")
    rows = []
    for number in range(NUM_SAMPLES):
        make_image(number).save(place / f"{number}.png")
        asked = {"from": "human", "value": "<image>\nWhich number?"}
        said = {"from": "gpt", "value": f"It is {number}."}
        rows.append({"id": f"s{number}", "image": f"{number}.png", "conversations": [asked, said]})
    (place / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "name": "run",
        "model": str(tiny_model()),
        "data": {"datasets": [{"path": f"{place}/shards"}], "num_readers": 0},
        "output_dir": str(place),
        "train_batch_size": 4,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 100,
        "save_steps": 2,
        "save_total_limit": 2,
        "bf16": False,
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return place


def submit(nodes: RayNodes, *words: str, options: tuple[str, ...] = ()) -> CompletedProcess[str]:
    at = ("--address", nodes.dashboard, "--working-dir", str(ROOT))
    return nodes.run_ray("job", "submit", *at, *options, "--", sys.executable, *words)


def list_workers(nodes: RayNodes) -> list[str]:
    """Return the processes of the cluster that train."""
    names = []
    for pid in nodes.nodes[0].list_alive():
        with suppress(psutil.NoSuchProcess):
            names.append(" ".join(psutil.Process(pid).cmdline()))
    return [name for name in names if "TrainWorker" in name]


def find_last_step(run: Path) -> int:
    """Return the step of the last checkpoint that Ray would go on from; 0 if there is none."""
    try:
        told = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, ValueError):  # or it is being written
        return 0
    return int(told["latest_checkpoint_result"]["checkpoint_dir_name"].removeprefix("checkpoint-"))


def test_convert_train_and_evaluate_run_as_jobs_and_a_stopped_training_goes_on(
    nodes: RayNodes, place: Path
) -> None:
    raw = ("--input", f"{place}/rows.json", "--images", str(place))
    done = submit(nodes, "jobs/convert.py", "llava", *raw, "--output", f"{place}/shards")
    assert done.returncode == 0, done.stdout
    assert f"{NUM_SAMPLES} samples" in " ".join(done.stdout.split())

    train = ("jobs/train.py", f"{place}/recipe.yaml")
    options = ("--no-wait", "--submission-id", "training")
    assert submit(nodes, *train, options=options).returncode == 0
    wait_for(lambda: find_last_step(place / "run") > 0, 180, lambda: read_log(nodes))
    assert list_workers(nodes)
    assert nodes.run_ray("job", "stop", "--address", nodes.dashboard, "training").returncode == 0
    wait_for(lambda: not list_workers(nodes), 60)
    step = find_last_step(place / "run")
    assert read_progress(place / "run" / f"checkpoint-{step}").step == step

    done = submit(nodes, *train, "--resume", f"max_steps={step + 2}")
    assert done.returncode == 0, done.stdout
    assert f"step {step} of {step + 2}" in done.stdout
    load_model(place / "run" / "export", dtype="float32", device="cpu")

    asked = ("--tasks", "own_exact", "--data", f"{place}/shards", "--model", f"{place}/run/export")
    done = submit(nodes, "jobs/evaluate.py", *asked, "--limit=4", "--output", f"{place}/results")
    assert done.returncode == 0, done.stdout
    assert (place / "results" / "report.html").is_file()


def test_a_job_with_a_wrong_setting_fails_and_says_which(nodes: RayNodes, place: Path) -> None:
    done = submit(nodes, "jobs/train.py", f"{place}/recipe.yaml", "learning_rat=1")
    assert done.returncode == 1
    assert "did you mean learning_rate" in done.stdout


def read_log(nodes: RayNodes) -> str:
    return nodes.run_ray("job", "logs", "--address", nodes.dashboard, "training").stdout
