"""How much of a GPU's arithmetic training uses: model FLOPs utilization (Chowdhery et al. 2022).

A token costs two operations a weight on its way forward, two more on the way back to the projector,
and two for the gradient of each weight that is trained; padding and what gradient checkpointing
computes twice count for nothing. The tower and the products of attention, a few percent in a
LLaVA, are left out.
"""

from collections.abc import Sequence

import torch

from llava_ray.config import TrainConfig
from llava_ray.train.param_groups import ParamGroupSummary

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "A10": 125.0,
    "V100": 125.0,
    "L4": 121.0,
}
"""Dense products in half precision, by a part of the device's name; makers' figures."""


def count_flops(param_groups: Sequence[ParamGroupSummary]) -> float:
    """Return the operations that training on a token takes."""
    return float(
        sum(
            4 * group.num_parameters + 2 * group.num_trainable
            for group in param_groups
            if group.name != "vision_tower"
        )
    )


def find_peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    """Return the operations that a device can do in a second; None if nobody says."""
    if config.peak_tflops:
        return config.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for model, peak in PEAK_TFLOPS.items() if model in name), None)


def compute_mfu(flops: float, elapsed_s: float, peak: float | None, num_workers: int) -> float:
    """Return which share of what the workers' devices can do was used; 0 if that is unknown."""
    return flops / (elapsed_s * peak * num_workers) if peak else 0.0
