"""The cluster files: Ray accepts them, and what their machines run exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "jobs" / "configs"
CLOUDS = [ROOT / "cluster.yaml", CONFIGS / "cluster_gcp.yaml"]
CLUSTERS = [*CLOUDS, CONFIGS / "cluster_local.yaml"]
LARGEST_UPLOAD_BYTES = 100 << 20  # of Ray's dashboard, which takes the working directory of a job


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_accepts_a_cluster_file(path: Path) -> None:
    validate_config(prepare_config(read(path)))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_machine_gets_the_project_and_the_token_before_ray_starts(path: Path) -> None:
    config = read(path)
    assert config["file_mounts"]["~/llava_ray"] == "."
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    setup = "\n".join(config["setup_commands"])
    assert "RAY_AUTH_MODE=token" in setup
    for command in re.findall(r"llava_ray/(\S+)", setup):
        assert (ROOT / command).exists(), f"{path.name} installs {command}, which does not exist"


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_head_takes_no_work_and_shows_its_dashboard_to_itself_alone(path: Path) -> None:
    config = read(path)
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_health_check_timeout_ms=1000" in start, "a machine that hangs is missed for long"
    if path in CLOUDS:
        assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    else:
        assert "--num-cpus=0" in start


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_gpu_machines_start_at_none_and_some_are_spot(path: Path) -> None:
    config = read(path)
    workers = {k: v for k, v in config["available_node_types"].items() if k != "head"}
    assert all(each["min_workers"] == 0 and each["resources"]["GPU"] for each in workers.values())
    assert sum(each["max_workers"] for each in workers.values()) <= config["max_workers"]
    spot = [k for k, v in workers.items() if v["labels"]["ray.io/market-type"] == "spot"]
    assert spot == ["train_spot"]
    node = workers["train_spot"]["node_config"]
    asked = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    assert asked or {"preemptible": True} in node["scheduling"]


def test_a_job_uploads_far_less_than_the_dashboard_takes(tmp_path: Path) -> None:
    package = tmp_path / "working_dir.zip"
    create_package(str(ROOT), package, include_gitignore=True, include_parent_dir=False)
    assert package.stat().st_size < LARGEST_UPLOAD_BYTES / 2


def test_the_image_has_the_compiler_that_triton_needs_and_does_not_run_as_root() -> None:
    lines = (ROOT / "jobs" / "Dockerfile").read_text().splitlines()
    assert any(line.startswith("RUN") and " gcc libc6-dev " in line for line in lines)
    assert [line for line in lines if line.startswith("USER")][-1] == "USER ray"


def test_the_image_of_google_s_machines_has_a_driver_for_the_cuda_that_is_installed() -> None:
    requirements = (CONFIGS / "requirements.txt").read_text()
    cuda = re.search(r"^cuda-toolkit\S*==(\d+)\.", requirements, re.MULTILINE)
    assert cuda
    needed = {"12": 525, "13": 580}[cuda[1]]
    images = re.findall(r"nvidia-(\d+)$", (CONFIGS / "cluster_gcp.yaml").read_text(), re.MULTILINE)
    assert images
    assert all(int(driver) >= needed for driver in images)


def test_every_machine_of_aws_may_read_and_write_the_bucket_of_the_recipes() -> None:
    types = read(ROOT / "cluster.yaml")["available_node_types"].values()
    profiles = [each["node_config"]["IamInstanceProfile"]["Arn"] for each in types]
    assert len(profiles) == 3
    assert set(profiles) == {"arn:aws:iam::123456789012:instance-profile/llava-ray"}


def test_every_worker_of_google_may_too() -> None:
    types = read(CONFIGS / "cluster_gcp.yaml")["available_node_types"]
    workers = [each["node_config"] for name, each in types.items() if name != "head"]
    assert all(each["serviceAccounts"][0]["email"].startswith("llava-ray@") for each in workers)


@pytest.mark.parametrize(("path", "package"), [(CLOUDS[0], "s3fs"), (CLOUDS[1], "gcsfs")])
def test_every_machine_has_what_reads_the_cloud_s_addresses(path: Path, package: str) -> None:
    assert any(command.endswith(f" {package}") for command in read(path)["setup_commands"])
