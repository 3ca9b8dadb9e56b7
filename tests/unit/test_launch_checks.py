"""What is refused before machines are asked for."""

from pathlib import Path

import pytest

from llava_ray.config import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.train.launch import check_cpus, resolve_paths


def make_config(**settings) -> TrainConfig:
    data = {"datasets": [{"path": "/data"}]} | settings.pop("data", {})
    return TrainConfig(**{"model": "/model", "name": "n", "data": data, **settings})


def test_readers_that_would_wait_for_cpus_without_end_are_refused():
    eight = {"num_workers": 8, "train_batch_size": 16, "per_device_train_batch_size": 2}
    check_cpus(make_config(**eight), 24)
    with pytest.raises(ConfigError, match=r"8 workers need 24 CPUs.*start 16: lower data.num_read"):
        check_cpus(make_config(**eight), 16)
    check_cpus(make_config(**eight, min_workers=2), 6)
    check_cpus(make_config(**eight, data={"reader_cpus": 0.25}), 16)


def test_a_run_in_a_job_s_copy_of_its_working_directory_is_refused(tmp_path: Path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"output_dir='outputs' is relative.*s3://"):
        resolve_paths(make_config())
    assert resolve_paths(make_config(output_dir="/shared")).output_dir == "/shared"
    assert resolve_paths(make_config(output_dir="s3://bucket/runs")).output_dir.startswith("s3://")
