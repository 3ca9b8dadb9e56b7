"""Builds the engine that a model's configuration names; only this file lists all engines."""

import os
from collections.abc import Mapping
from typing import Any

from llava_ray.config import ModelConfig
from llava_ray.config.model import count_threads
from llava_ray.engine.protocol import Engine, NoteImages, ignore_images
from llava_ray.errors import ConfigError


def load_engine(
    config: ModelConfig,
    *,
    note_images: NoteImages = ignore_images,
    loading: Mapping[str, Any] | None = None,
) -> Engine:
    """Load a model and start the engine that its configuration names.

    Each engine's packages are imported only when that engine is chosen.

    Args:
        config: the model's configuration.
        note_images: called with counts of encoded and cached images; torch engine only.
        loading: arguments of `load_model` that override those derived from the configuration,
            such as `base`; torch engine only.

    Raises:
        ConfigError: the model cannot be loaded, or the engine is not available here.
    """
    if config.engine_options and config.engine not in ("vllm", "sglang"):
        raise ConfigError(
            f"engine_options are for vllm and sglang only; engine={config.engine!r} takes none: "
            f"remove {', '.join(config.engine_options)}"
        )
    if loading and config.engine != "torch":
        raise ConfigError(
            f"{', '.join(loading)} can be given for the torch engine only: leave it out, or turn "
            "the checkpoint into a complete one with `llava-ray export`"
        )
    if config.adapters and config.engine in ("vllm", "sglang"):
        raise ConfigError(
            f"engine={config.engine!r} does not apply adapters to a shared base model: use "
            f"engine='torch', or serve {', '.join(config.adapters)} as models of their own, with "
            "the adapter's folder as the path"
        )
    match config.engine:
        case "echo":
            from llava_ray.engine.echo import EchoEngine

            return EchoEngine(delay_s=config.echo_delay_s, template=config.template)
        case "torch":
            # OpenMP and torch read these when torch is imported; Ray has set the first to num_cpus.
            os.environ["OMP_NUM_THREADS"] = str(count_threads(config))
            # So that memory freed while weights are joined goes to the cache; see `fused_decoder`.
            if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
                os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            from llava_ray.engine.torch_engine.engine import TorchEngine

            return TorchEngine.load(config, note_images=note_images, loading=loading)
        case "vllm":
            from llava_ray.engine.external.engine import ExternalEngine
            from llava_ray.engine.external.vllm_engine import VLLM

            return ExternalEngine(config, VLLM)
        case "sglang":
            from llava_ray.engine.external.engine import ExternalEngine
            from llava_ray.engine.external.sglang_engine import SGLANG

            return ExternalEngine(config, SGLANG)
