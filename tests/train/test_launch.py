"""Training on Ray: a worker that is killed, a driver that is killed, other workers; the export."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_ray.cli import app
from llava_ray.config import ConvertConfig, TrainConfig
from llava_ray.data.loader.stream import EncoderSpec, stream_batches
from llava_ray.errors import ConfigError, DivergedError
from llava_ray.model import load_model
from llava_ray.train.log import read_log
from llava_ray.train.settings import load_train_config
from tests.support.tiny_checkpoint import tiny_model
from tests.support.train_runs import (
    NUM_SAMPLES,
    assert_same_run,
    make_config,
    read_steps,
    write_rows,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def shards(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards that `convert` wrote."""
    from llava_ray.data.convert.run import convert_dataset

    folder = tmp_path_factory.mktemp("raw")
    out = folder / "shards"
    convert_dataset(
        ConvertConfig(
            source="llava",
            input=str(write_rows(folder)),
            output=str(out),
            images=str(folder),
            rows_per_shard=10,
        )
    )
    return out


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was launched at an address; `file://` goes the way of s3://."""
    from llava_ray.train.launch import launch

    output = tmp_path_factory.mktemp("plain")
    settings = {"eval_datasets": [{"path": str(shards)}], "num_generations": 1}
    config = make_config(shards, output, num_readers=1, **settings, report_to=["tensorboard"])
    config = config.model_copy(update={"output_dir": f"file://{output}"})
    assert launch(config) == f"file://{output}/run"
    return output / "run"


def test_a_run_ends_with_a_model_that_loads_and_says_what_it_was_made_from(
    undisturbed: Path,
) -> None:
    core = load_model(undisturbed / "export", dtype="float32", device="cpu")
    assert core.template.name == load_model(tiny_model()).template.name
    said = json.loads((undisturbed / "export" / "llava_ray_run.json").read_text())
    assert said["step"] == 18
    assert said["data"][0]["num_samples"] == NUM_SAMPLES
    assert load_train_config(undisturbed / "config.yaml").num_workers == 2
    checkpoints = [path for path in undisturbed.glob("checkpoint-*") if path.is_dir()]
    assert len(checkpoints) == 2


def test_each_epoch_sees_each_sample_once(undisturbed: Path) -> None:
    ids = [id_ for line in read_steps(undisturbed) for id_ in line["sample_ids"]]
    expected = sorted(f"s{number}" for number in range(NUM_SAMPLES))
    assert sorted(ids[:NUM_SAMPLES]) == expected
    assert sorted(ids[NUM_SAMPLES : 2 * NUM_SAMPLES]) == expected


def test_the_workers_of_ray_train_share_each_global_batch(undisturbed: Path) -> None:
    config = load_train_config(undisturbed / "config.yaml")
    data = config.data.model_copy(update={"num_readers": 0})
    whole = stream_batches(data, EncoderSpec(config.model), num_epochs=config.num_train_epochs)
    steps = [line["sample_ids"] for line in read_steps(undisturbed)]
    assert list(map(sorted, steps)) == [sorted(batch.sample_ids) for batch in whole]


@pytest.mark.slow
def test_a_killed_worker_changes_no_loss(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    from llava_ray.train.launch import launch

    killed: list[int] = []
    killer = threading.Thread(target=kill_worker, args=(tmp_path / "run", killed), daemon=True)
    killer.start()
    folder = Path(launch(make_config(shards, tmp_path, num_readers=1)))
    assert killed, "the run ended before a worker was killed"
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_fewer_workers(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    import ray

    from llava_ray.train.launch import launch

    config = make_config(shards, tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-m", "llava_ray.cli", "train", str(tmp_path / "run.yaml")],
        env={**os.environ, "RAY_ADDRESS": address},
    )
    wait_for_checkpoint(tmp_path / "run")
    driver.kill()
    driver.wait()
    with pytest.raises(ConfigError, match="--resume"):
        launch(config)
    one = make_config(shards, tmp_path, num_workers=1)
    assert_same_run(Path(launch(one, resume=True)), undisturbed)


def test_a_dry_run_says_what_would_be_done_and_trains_nothing(shards: Path, tmp_path: Path) -> None:
    benchmarks = {"tasks": ["own_exact"], "data": str(shards), "limit": 5}
    config = make_config(shards, tmp_path / "out", benchmarks=benchmarks)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    arguments = ["train", str(tmp_path / "run.yaml"), "learning_rate=3e-4", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for said in (
        "learning_rate: 0.0003",
        "vision_tower: frozen",
        "projector: trains",
        "2 samples x 1 accumulation steps x 2 workers = 4 per step",
        "24 samples = 6 steps per epoch x 3 epochs = 18 steps",
        "optimizer: ",
        "1 images",
        "It is ",
        "benchmarks, every 3 steps\nown_exact: 5 questions",
    ):
        assert said in result.output
    assert not (tmp_path / "out").exists()


def test_a_run_at_an_address_is_kept_there_whole(undisturbed: Path) -> None:
    """Its held-out loss and answers too."""
    lines = read_log(undisturbed)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 19))
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9, 12, 15, 18]
    *_, answers = [line["answers"] for line in lines if "answers" in line]
    assert answers[0]["right"].startswith("It is ")
    assert list(undisturbed.glob("tensorboard/events*"))
    assert (undisturbed / "curves.png").is_file()


@pytest.mark.slow
def test_benchmarks_measure_each_checkpoint_even_if_training_takes_every_cpu(
    shards: Path, tmp_path: Path
) -> None:
    """The best by one is exported, and one that cannot be measured ends nothing."""
    import ray

    from llava_ray.evaluate.during_training import prepare_benchmarks
    from llava_ray.train.launch import launch

    num_free = ray.available_resources()["CPU"]  # the rest is the applications' of other tests
    benchmarks = {"tasks": ["own_exact"], "data": str(shards), "limit": 4, "num_cpus": 0.5}
    settings = {"benchmarks": benchmarks, "metric_for_best_model": "own_exact", "num_workers": 1}
    settings |= {"cpus_per_worker": int(10 * num_free) / 10, "save_total_limit": 3}
    config = make_config(shards, tmp_path, **settings, save_steps=1, max_steps=3)
    evaluate = prepare_benchmarks(config)
    assert evaluate

    def evaluate_checkpoint(config: TrainConfig, checkpoint: str) -> dict[str, float]:
        step = int(checkpoint.rpartition("-")[2])
        if step == 1:
            raise ConfigError("the first one cannot be measured")
        measured = evaluate(config, checkpoint)
        assert measured == {"own_exact": 0}
        return {"own_exact": {2: 40.0, 3: 10.0}[step]}

    with pytest.raises(ConfigError, match="prepare_benchmarks"):
        launch(config)
    folder = Path(launch(config, evaluate_checkpoint=evaluate_checkpoint))
    for step in (2, 3):
        results = folder / "evaluations" / f"checkpoint-{step}"
        told = json.loads((results / "results.json").read_text())["tasks"]["own_exact"]
        assert told["num_scored"] == 4
        assert (results / "report.html").is_file()
    values = json.loads((folder / "checkpoint_manager_snapshot.json").read_text())
    metrics = {
        each["checkpoint_dir_name"]: each["metrics"]["own_exact"]
        for each in values["checkpoint_results"]
    }
    assert metrics.pop("checkpoint-1") is None
    assert metrics == {"checkpoint-2": 40, "checkpoint-3": 10}
    assert json.loads((folder / "export" / "llava_ray_run.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    ("benchmarks", "said"),
    [
        ({"tasks": ["own_exat"]}, "did you mean own_exact"),
        ({"tasks": ["pope"]}, "pope"),
    ],
)
def test_benchmarks_that_are_not_there_are_named_before_anything_starts(
    benchmarks: dict[str, Any], said: str, shards: Path, tmp_path: Path
) -> None:
    config = make_config(shards, tmp_path, benchmarks={"data": str(tmp_path), **benchmarks})
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    for argument in ("--dry-run", "--resume"):
        result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), argument])
        assert isinstance(result.exception, ConfigError)
        assert said in result.exception.message


@pytest.mark.slow
def test_a_run_that_diverges_is_over_at_once_and_says_why(shards: Path, tmp_path: Path) -> None:
    from llava_ray.train.launch import launch

    settings = {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_ratio": 0, "num_workers": 1}
    with pytest.raises(DivergedError, match="samples"):
        launch(make_config(shards, tmp_path, **settings, save_steps=1))
    assert len(read_steps(tmp_path / "run")) < 5
    load_model(tmp_path / "run" / "checkpoint-1" / "model", dtype="float32", device="cpu")


def test_a_template_that_does_not_fit_is_said_before_anything_starts(
    shards: Path, tmp_path: Path
) -> None:
    from llava_ray.train.preflight import open_run

    config = make_config(shards, tmp_path, template="vicuna_v11")
    with pytest.raises(ConfigError, match="template"):
        open_run(config)


def test_a_run_without_shards_says_so(tmp_path: Path) -> None:
    from llava_ray.train.launch import check_run
    from llava_ray.train.preflight import open_run

    config = make_config(tmp_path / "nothing", tmp_path)
    with pytest.raises(ConfigError, match="llava-ray convert"):
        check_run(config, open_run(config))


def wait_for_checkpoint(folder: Path) -> None:
    """Return as soon as Ray would go on from a checkpoint of the run."""
    snapshot = folder / "checkpoint_manager_snapshot.json"
    while not snapshot.exists() or "checkpoint-" not in snapshot.read_text():
        time.sleep(0.05)


def kill_worker(folder: Path, killed: list[int]) -> None:
    """Kill -9 a training worker of this process's Ray once there is a checkpoint to go on from."""
    import psutil

    wait_for_checkpoint(folder)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)
                return
