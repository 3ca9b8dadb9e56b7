"""vLLM as an `ExternalEngineKind`: how a model's configuration becomes vLLM's arguments.

`worker/vllm_worker.py` runs vLLM with them.
"""

import os
from pathlib import Path
from typing import Any

from llava_ray.config import ModelConfig
from llava_ray.engine.external.settings import (
    CPU_REQUESTS,
    MAX_IMAGES,
    ExternalEngineKind,
    choose_dtype_name,
)

_UTILIZATION = 0.9
"""vLLM's default: the part of a GPU's memory that it takes."""


def _describe_arguments(config: ModelConfig, folder: Path, on_gpu: bool) -> dict[str, Any]:
    arguments = {
        "model": str(folder),
        "dtype": choose_dtype_name(config, on_gpu=on_gpu),
        "max_model_len": config.context_length,
        "enable_prefix_caching": config.prefix_cache,
        "limit_mm_per_prompt": {"image": MAX_IMAGES},
    }
    if config.max_batch_size != "auto":
        arguments["max_num_seqs"] = config.max_batch_size
    elif not on_gpu:
        arguments["max_num_seqs"] = CPU_REQUESTS
    if config.gpu_share < 1:
        arguments["gpu_memory_utilization"] = round(_UTILIZATION * config.gpu_share, 3)
    return arguments


def _describe_environment(config: ModelConfig, on_gpu: bool) -> dict[str, str]:
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if on_gpu:
        return settings
    return settings | {
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    }


VLLM = ExternalEngineKind("vllm", "vLLM", _describe_arguments, _describe_environment)
