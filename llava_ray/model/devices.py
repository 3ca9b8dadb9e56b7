"""Which device computes: what a configuration's name stands for, and whether it can be used.

No function here starts CUDA before a process is known to compute on a GPU. CUDA reads
CUDA_VISIBLE_DEVICES once, and Ray sets that variable anew for each task of a process that it
reuses: a process that has started CUDA too early computes on another task's GPU. So GPUs are
counted through NVML, the driver's management library.
"""

import os
import re
import subprocess
from pathlib import Path

import torch

from llava_ray.cluster import find_assigned_gpus
from llava_ray.errors import ConfigError

OLDEST_CAPABILITY = (7, 5)
"""Compute capability of the oldest GPUs for which torch is built (CUDA 13): Turing, such as T4."""

_SHORTAGE = re.compile(
    r"Tried to allocate (\S+ \S+)\. GPU (\d+) has a total capacity of (\S+ \S+) of which (\S+ \S+) "
    "is free"
)
"""torch's message when a GPU has too little memory."""

_DRIVER = Path("/proc/driver/nvidia/version")


def has_gpu() -> bool:
    """Return whether this process sees a GPU, without starting CUDA.

    A GPU that is seen may still be unusable, for example because its driver is too old for torch:
    `select_device` says so.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch reads it at each call
    return torch.cuda.is_available()


def computes_on_gpu() -> bool:
    """Return whether "auto" is a GPU in this process.

    In a process that Ray started it is one if Ray gave it one, whether or not torch can use it;
    elsewhere, if torch sees one.
    """
    assigned = find_assigned_gpus()
    return has_gpu() if assigned is None else bool(assigned)


def select_device(name: str) -> torch.device:
    """Return the torch device that `name` ("auto", "cpu", "cuda:1", ...) stands for.

    A GPU is started, so that one that cannot be used is found here: nothing computes on the CPU
    because of a driver that does not work.

    Raises:
        ConfigError: there is no such device, or torch cannot compute on it.
    """
    if name == "auto":
        name = "cuda" if computes_on_gpu() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a device: use auto, cpu or cuda:N") from error
    if device.type == "cuda":
        _start_gpu(device)
    return device


def _start_gpu(device: torch.device) -> None:
    num_gpus = torch.cuda.device_count() if has_gpu() else 0
    if (device.index or 0) >= num_gpus:
        raise ConfigError(
            f"device={str(device)!r}: torch sees {num_gpus} GPUs here ({_explain_absence()}); use "
            "auto or cpu, with num_gpus=0 where Ray gives GPUs"
        )
    try:
        torch.cuda.init()
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={str(device)!r} cannot be used: {error} ({describe_driver()}); install a "
            "driver or a torch that match, or set device=cpu and num_gpus=0"
        ) from error
    if capability < OLDEST_CAPABILITY:
        raise ConfigError(
            f"{name} has compute capability {_version(capability)}, and torch computes on "
            f"{_version(OLDEST_CAPABILITY)} (Turing, such as T4) or newer: use another GPU, or set "
            "device=cpu and num_gpus=0"
        )


def read_capability() -> tuple[int, int] | None:
    """Return the compute capability of the first visible GPU, without starting CUDA here.

    None: NVIDIA's tool is not there, or says nothing.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", f"--id={visible}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        major, minor = done.stdout.split()[0].split(".")
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def describe_device(device: torch.device) -> str:
    """Return a device's name, with the model of a GPU."""
    if device.type != "cuda":
        return device.type
    return f"{device} ({torch.cuda.get_device_name(device)})"


def describe_driver() -> str:
    """Return the version of NVIDIA's driver and of the CUDA that torch is built for."""
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    try:
        line = _DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return f"{built}; no NVIDIA driver is loaded"
    version = next((word for word in line.split() if word[0].isdigit() and "." in word), line)
    return f"{built}; NVIDIA driver {version}"


def describe_shortage(error: torch.OutOfMemoryError) -> str:
    """Return how much memory a GPU was asked for, and how much it had."""
    numbers = _SHORTAGE.search(str(error))
    if not numbers:
        return str(error).splitlines()[0]
    needed, gpu, total, free = numbers.groups()
    return f"{needed} more were needed, and GPU {gpu} had {free} of its {total} free"


def _explain_absence() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    is_limited = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r}"
    return describe_driver() + is_limited


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
