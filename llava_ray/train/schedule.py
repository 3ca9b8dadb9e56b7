"""The learning rate of a step: warm-up, then cosine, linear or constant.

A pure function of the step, so that nothing of it needs to be saved.
"""

import math

from llava_ray.config import TrainConfig


def compute_lr_scale(config: TrainConfig, step: int, num_steps: int) -> float:
    """Return which share of its highest learning rate each part has at a step.

    Args:
        config: of the run.
        step: counted from 0.
        num_steps: of the whole run.
    """
    num_warmup = count_warmup(config, num_steps)
    if step < num_warmup:
        return step / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.lr_scheduler_type == "linear" else 1.0


def count_warmup(config: TrainConfig, num_steps: int) -> int:
    """Return in how many steps the learning rate rises, as Hugging Face's Trainer counts them."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * num_steps)
