"""SGLang as an `ExternalEngineKind`: how a model's configuration becomes SGLang's arguments.

`worker/sglang_worker.py` runs SGLang with them.
"""

from pathlib import Path
from typing import Any

from llava_ray.config import ModelConfig
from llava_ray.engine.external.settings import (
    CPU_REQUESTS,
    CPU_TOKENS,
    ExternalEngineKind,
    choose_dtype_name,
)

_STATIC_FRACTION = 0.85
"""Part of a GPU's memory for weights and cache, as SGLang takes where it has a whole one."""


def _describe_arguments(config: ModelConfig, folder: Path, on_gpu: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        "dtype": choose_dtype_name(config, on_gpu=on_gpu),
        "context_length": config.context_length,
        "disable_radix_cache": not config.prefix_cache,
        "skip_server_warmup": True,
        "log_level": "warning",
    }
    if config.max_batch_size != "auto":
        arguments["max_running_requests"] = config.max_batch_size
    if config.cache_tokens != "auto":
        arguments["max_total_tokens"] = config.cache_tokens
    if on_gpu:
        if config.gpu_share < 1:
            arguments["mem_fraction_static"] = round(_STATIC_FRACTION * config.gpu_share, 3)
        return arguments
    return arguments | {
        "max_running_requests": arguments.get("max_running_requests", CPU_REQUESTS),
        "max_total_tokens": arguments.get("max_total_tokens", CPU_TOKENS),
        "model_impl": "transformers",
        "device": "cpu",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
    }


def _describe_environment(config: ModelConfig, on_gpu: bool) -> dict[str, str]:
    # With more than one thread it is ten times slower on CPUs with few cores.
    return {} if on_gpu else {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}


def _find_unsupported(config: ModelConfig) -> tuple[str, ...]:
    """Its repetition penalty ignores the prompt. It honours seeds in its deterministic mode only,
    which does not support min_p."""
    is_deterministic = config.engine_options.get("enable_deterministic_inference")
    return ("repetition_penalty", "min_p" if is_deterministic else "seed")


SGLANG = ExternalEngineKind(
    "sglang",
    "SGLang",
    _describe_arguments,
    _describe_environment,
    unsupported=_find_unsupported,
)
