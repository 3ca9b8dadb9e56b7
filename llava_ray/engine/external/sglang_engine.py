"""SGLang as an `ExternalEngineKind`: how a model's configuration becomes SGLang's arguments.

`worker/sglang_worker.py` runs SGLang with them.
"""

from pathlib import Path
from typing import Any

from llava_ray.config import ModelConfig
from llava_ray.engine.external.settings import ExternalEngineKind


def _describe_arguments(config: ModelConfig, folder: Path, on_gpu: bool) -> dict[str, Any]:
    arguments = {
        "model_path": str(folder),
        "dtype": config.dtype,
        "context_length": config.context_length,
        "max_running_requests": config.max_batch_size,
        "max_total_tokens": config.cache_tokens,
        "disable_radix_cache": not config.prefix_cache,
        "model_impl": "transformers",
        "skip_server_warmup": True,
        "log_level": "warning",
    }
    if on_gpu:
        return arguments
    return arguments | {
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
