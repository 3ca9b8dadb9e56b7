"""Ray whose GPUs are pretended: each process computes on its own, or on none."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.support.ray_nodes import RayNode, find_port
from tests.support.wait import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROCESSES = """
import os
import ray

ray.init(
    address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False,
    logging_level="ERROR",
)


@ray.remote(num_cpus=0)
class Process:
    def choose(self):
        import torch
        from llava_ray.model.devices import select_device

        torch.cuda.is_available = lambda: True  # Ray hides no GPU from those that asked for none
        torch.cuda.device_count = lambda: 2
        torch.cuda.init = lambda: None
        torch.cuda.get_device_capability = lambda device: (9, 0)
        torch.cuda.get_device_name = lambda device: "pretended"
        return str(select_device("auto")), os.environ.get("CUDA_VISIBLE_DEVICES")


actors = [Process.options(num_gpus=n).remote() for n in (1, 0.5, 0)]
for device, visible in ray.get([actor.choose.remote() for actor in actors]):
    print(device, visible if device == "cuda" else "")

from llava_ray.cluster import choose_num_gpus, count_gpus

print(count_gpus(), choose_num_gpus("auto", if_any=1))
"""


def run(program: str, *words: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", program, *words]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_each_process_computes_on_the_gpu_that_ray_gave_it_and_the_others_on_the_cpu():
    first, second, third, counted = run(PROCESSES)
    assert {first, second} == {"cuda 0", "cuda 1"}
    assert third.strip() == "cpu"
    assert counted == "2.0 1"


TRAINER = """
import sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
from llava_ray.cluster import count_gpus
from llava_ray.config import TrainConfig
from llava_ray.train.launch import make_trainer

data = {"datasets": [{"path": "/data"}]}
trainer = make_trainer(TrainConfig(model="/model", name="n", data=data, output_dir="/out"))
scaling = trainer.scaling_config
print(ray.cluster_resources().get("GPU", 0), count_gpus())
print(scaling.use_gpu, scaling.resources_per_worker["GPU"], trainer.backend_config.backend)
"""


COMMANDS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def test_training_waits_for_the_gpus_that_an_autoscaler_brings(tmp_path: Path):
    """On the shipped clusters no machine with GPUs runs when a job begins."""
    file = tmp_path / "autoscaler.yaml"
    gpu = {"resources": {"CPU": 8, "GPU": 4}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "pretended",
        "max_workers": 4,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {"type": "fake_multinode"},
        "available_node_types": {"head": head, "gpu": gpu},
        "head_node_type": "head",
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in COMMANDS},
        "file_mounts_sync_continuously": False,
    }
    file.write_text(yaml.safe_dump(config))
    port = find_port()
    folder = tempfile.TemporaryDirectory(prefix="ray-")  # the paths of sockets must be short
    head_node = RayNode(
        tmp_path,
        tmp_path / "log",
        "--head",
        f"--port={port}",
        "--num-cpus=0",
        "--include-dashboard=false",
        f"--autoscaling-config={file}",
        f"--temp-dir={folder.name}",
        RAY_FAKE_CLUSTER="1",
        RAY_AUTH_MODE="disabled",
    )
    try:
        wait_until(lambda: b"runtime started" in (tmp_path / "log").read_bytes(), "Ray started")
        counted, chosen = run(TRAINER, f"127.0.0.1:{port}")
    finally:
        head_node.kill()
        folder.cleanup()
    assert counted == "0 8.0"
    assert chosen == "True 1 nccl"
