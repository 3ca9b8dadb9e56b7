"""Which device computes and in which precision; stand-ins for CUDA, no GPU is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llava_ray
from llava_ray.errors import ConfigError
from llava_ray.model.devices import has_gpu, select_device
from llava_ray.model.precision import choose_dtype
from tests.support.fake_cuda import pretend_gpu

WATCH_CUDA = """
import os, sys
os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
import torch
calls = []
for name in ("is_available", "device_count", "init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, lambda *_, name=name, **__: calls.append(name) or 0)
import importlib
for module in sys.argv[1:]:
    importlib.import_module(module)
print(*calls)
"""


def test_no_module_asks_for_gpus_when_it_is_imported():
    """Ray reuses processes: one that has started CUDA keeps the GPUs that it saw then."""
    package = Path(llava_ray.__file__).parent
    modules = [
        ".".join(["llava_ray", *path.relative_to(package).with_suffix("").parts])
        for folder in ("data", "model", "engine", "train", "evaluate", "serve/replica")
        for path in package.glob(f"{folder}/**/*.py")
        if path.stem != "__init__" and "worker" not in path.parts and "triton" not in path.stem
    ]
    command = [sys.executable, "-W", "ignore", "-c", WATCH_CUDA, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_gpus_are_counted_without_starting_cuda(monkeypatch):
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    asked = []

    def is_available() -> bool:
        import os

        asked.append(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert not has_gpu()
    assert asked == ["1"]


def test_a_gpu_that_is_seen_and_cannot_be_used_is_an_error_with_torch_s_reason(monkeypatch):
    pretend_gpu(monkeypatch, failure="The NVIDIA driver on your system is too old (found 12080).")
    with pytest.raises(ConfigError, match=r"driver on your system is too old.*device=cpu"):
        select_device("auto")


def test_a_gpu_that_torch_is_not_built_for_is_refused_by_name(monkeypatch):
    pretend_gpu(monkeypatch, name="Tesla V100-SXM2-16GB", capability=(7, 0))
    with pytest.raises(ConfigError, match=r"V100.*compute capability 7\.0.*7\.5"):
        select_device("cuda")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_auto_is_the_16_bit_dtype_that_the_gpu_multiplies_in_hardware(
    monkeypatch, capability, dtype
):
    pretend_gpu(monkeypatch, capability=capability)
    assert choose_dtype(select_device("auto")) is dtype


def test_a_missing_gpu_is_told_with_the_reason(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"torch sees 0 GPUs here \(torch .* CUDA"):
        select_device("cuda:3")
