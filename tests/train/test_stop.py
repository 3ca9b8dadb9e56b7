"""A run that gets a signal keeps a checkpoint, says so, and goes on from it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.train_runs import make_config, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_resume_goes_on(
    cluster: None, tmp_path: Path, number: signal.Signals
) -> None:
    import ray

    from llava_ray.config import ConvertConfig
    from llava_ray.data.convert.run import convert_dataset

    shards = tmp_path / "shards"
    rows = str(write_rows(tmp_path))
    convert_dataset(
        ConvertConfig(source="llava", input=rows, output=str(shards), images=str(tmp_path))
    )
    config = make_config(shards, tmp_path, num_workers=1, num_train_epochs=1000, save_steps=100000)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "llava_ray.cli", "train", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    log = tmp_path / "run" / "train_log.jsonl"
    while driver.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    driver.send_signal(number)
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 1, said
    (kept,) = (path for path in (tmp_path / "run").glob("checkpoint-*") if path.is_dir())
    step = int(kept.name.rpartition("-")[2])
    assert f"stopped after step {step}" in said
    assert f"{kept.name} in" in said
    assert "--resume" in said
    again = subprocess.run(
        [*command, "--resume", f"max_steps={step + 2}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resuming from {kept.name}" in again.stdout
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, step + 3))
