"""What is refused before machines are asked for."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from llava_ray.config import TrainConfig
from llava_ray.errors import ConfigError, MissingPackageError
from llava_ray.train.deepspeed_engine import choose_attention
from llava_ray.train.launch import check_cpus, resolve_paths
from llava_ray.train.preflight import open_run

RECIPES = Path(__file__).parents[2] / "llava_ray" / "recipes"


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


@pytest.mark.parametrize(
    ("settings", "package", "told"),
    [
        ({"attention": "flash_attention_2"}, "flash_attn", "attention=auto"),
        ({"method": "lora", "quantization": "4bit"}, "bitsandbytes", r"llava-ray\[quant\]"),
        ({"use_liger_kernel": True}, "liger_kernel", "pip install liger-kernel"),
    ],
)
def test_a_package_that_workers_would_miss_is_told_before_they_start(
    monkeypatch, settings, package, told
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(MissingPackageError, match=told):
        open_run(make_config(**settings))


def test_every_recipe_runs_with_the_packages_that_are_installed_by_the_cluster_files():
    requirements = (Path(__file__).parents[2] / "jobs/configs/requirements.txt").read_text()
    names = {"flash_attention_2": "flash-attn", "4bit": "bitsandbytes", "8bit": "bitsandbytes"}
    for file in RECIPES.glob("*.yaml"):
        recipe = yaml.safe_load(file.read_text())
        for value in (recipe.get("attention"), recipe.get("quantization")):
            assert names.get(value, "") in requirements, f"{file.name} needs {names[value]}"


def test_auto_attention_is_flash_attention_where_it_runs(monkeypatch):
    assert choose_attention("eager", is_gpu=True, is_bf16=True) == "eager"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn")
    assert choose_attention("auto", is_gpu=True, is_bf16=True) == "flash_attention_2"
    assert choose_attention("auto", is_gpu=True, is_bf16=False) == "sdpa"
    assert choose_attention("auto", is_gpu=False, is_bf16=True) == "sdpa"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_attention("auto", is_gpu=True, is_bf16=True) == "sdpa"
