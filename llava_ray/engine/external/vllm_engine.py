"""vLLM as an `ExternalEngineKind`: how a model's configuration becomes vLLM's arguments.

`worker/vllm_worker.py` runs vLLM with them.
"""

import os
from pathlib import Path
from typing import Any

from llava_ray.config import ModelConfig
from llava_ray.engine.external.settings import MAX_IMAGES, ExternalEngineKind


def _describe_arguments(config: ModelConfig, folder: Path, on_gpu: bool) -> dict[str, Any]:
    return {
        "model": str(folder),
        "dtype": config.dtype,
        "max_model_len": config.context_length,
        "max_num_seqs": config.max_batch_size,
        "enable_prefix_caching": config.prefix_cache,
        "limit_mm_per_prompt": {"image": MAX_IMAGES},
    }


def _describe_environment(config: ModelConfig, on_gpu: bool) -> dict[str, str]:
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if on_gpu:
        return settings
    return settings | {
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    }


VLLM = ExternalEngineKind("vllm", "vLLM", _describe_arguments, _describe_environment)
