"""DeepSpeed's configuration, from the run's settings or from a JSON file with "auto" values.

Used by `deepspeed_engine`. DeepSpeed itself has no "auto"; Hugging Face's Trainer introduced it.
Each "auto" means the same here as there, except that buckets have a minimum size.
"""

import json
from typing import Any

from llava_ray.config import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.recipes import find_deepspeed_file

AUTO = "auto"
MIN_BUCKET = 2**22
"""Minimum number of gradient elements per reduction; else small models reduce weights singly."""


def describe_engine(
    config: TrainConfig, *, num_workers: int, hidden_size: int, is_bf16: bool
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run, complete.

    Args:
        config: of the run.
        num_workers: that it runs on now.
        hidden_size: of the language model, by which buckets are measured.
        is_bf16: weights are bfloat16.

    Raises:
        ConfigError: the JSON cannot be read, contradicts the settings, or leaves an "auto" open.
    """
    found = _read(config.deepspeed) if config.deepspeed else _make(config)
    known = _know(config, num_workers, hidden_size, is_bf16)
    for section in ("optimizer", "scheduler"):
        _drop(found, section, config.deepspeed)
    resolved = _resolve(found, known, "", config.deepspeed)
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
    ):
        _agree(resolved, name, known[name], config.deepspeed)
    _partition_bf16(resolved, is_bf16=is_bf16)
    # AdamW is torch's, which DeepSpeed has no need to know; off GPUs it has no kernel of its own.
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **resolved,
    }


def _partition_bf16(resolved: dict[str, Any], *, is_bf16: bool) -> None:
    """Use ZeRO 1 for ZeRO 0 in bfloat16.

    DeepSpeed's optimizer for the latter takes a step without gradients before the first, and its
    checkpoints cannot be restored by another number of workers.
    """
    if is_bf16 and read_stage(resolved) == 0:
        resolved.setdefault("zero_optimization", {})["stage"] = 1


def read_stage(engine_config: dict[str, Any]) -> int:
    """Return the ZeRO stage of DeepSpeed's configuration."""
    return int(engine_config.get("zero_optimization", {}).get("stage", 0))


def _make(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration that zero_stage and offload stand for."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": AUTO,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": AUTO,
            "stage3_param_persistence_threshold": AUTO,
        }
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        **dict.fromkeys(names, AUTO),
        "gradient_clipping": AUTO,
        "bf16": {"enabled": AUTO},
        "zero_optimization": zero,
    }


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(find_deepspeed_file(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"deepspeed={path!r} cannot be read ({error}): give a DeepSpeed JSON, such as "
            "zero2.json, which is shipped, or set zero_stage instead"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed={path!r} does not contain a JSON object")
    return content


def _know(config: TrainConfig, num_workers: int, hidden_size: int, is_bf16: bool) -> dict[str, Any]:
    zero = "zero_optimization."
    accumulation = config.count_accumulation(num_workers)
    size = config.per_device_train_batch_size
    return {
        # DeepSpeed requires that these three agree.
        "train_batch_size": size * accumulation * num_workers,
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": is_bf16,
        "fp16.enabled": False,
        f"{zero}reduce_bucket_size": max(hidden_size**2, MIN_BUCKET),
        f"{zero}stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        f"{zero}stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _resolve(value: Any, known: dict[str, Any], place: str, path: str | None) -> Any:
    if isinstance(value, dict):
        inside = f"{place}." if place else ""
        return {n: _resolve(v, known, inside + n, path) for n, v in value.items()}
    if value != AUTO:
        return value
    if place not in known:
        raise ConfigError(f'deepspeed={path!r}: "auto" is not supported for {place}; give a value')
    return known[place]


def _drop(found: dict[str, Any], section: str, path: str | None) -> None:
    """Leave out the optimizer and the schedule, which are the run's own settings."""
    said = found.pop(section, None) or {}
    params = said.get("params", {})
    given = {n: v for n, v in params.items() if v != AUTO}
    if given:
        raise ConfigError(
            f"deepspeed={path!r} sets {section}.params {sorted(given)}: remove them, and set "
            "learning_rate, adam_beta1, weight_decay, lr_scheduler_type, ... in the run's YAML"
        )


def _agree(resolved: dict[str, Any], name: str, value: Any, path: str | None) -> None:
    """Put a value in, or raise if the JSON has another."""
    *outer, last = name.split(".")
    place = resolved
    for part in outer:
        place = place.setdefault(part, {})
    if place.setdefault(last, value) != value:
        raise ConfigError(
            f"deepspeed={path!r} sets {name}={place[last]}, but the run's settings imply "
            f'{value}: write "auto" there'
        )
