"""Configuration -> a running engine: the one place that knows which engines there are."""

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
    """Load a model and start the engine that the configuration names.

    Each engine's packages are imported only when that engine is asked for.

    Args:
        config: of the model.
        note_images: told what becomes of images; of the torch engine only.
        loading: arguments of `load_model` in place of those that follow from the configuration,
            such as `base`; of the torch engine only.

    Raises:
        ConfigError: the model does not load, or the engine is not available here.
    """
    if config.engine_options and config.engine not in ("vllm", "sglang"):
        raise ConfigError(
            f"engine_options are for vllm and sglang; engine={config.engine!r} has none: leave "
            f"{', '.join(config.engine_options)} out"
        )
    if loading and config.engine != "torch":
        raise ConfigError(
            f"{', '.join(loading)} can be given for the torch engine only: leave it out, or "
            "`llava-ray export` the checkpoint as one that is whole"
        )
    if config.adapters and config.engine in ("vllm", "sglang"):
        raise ConfigError(
            f"adapters beside a model are not for engine={config.engine!r}: use torch, or serve "
            f"{', '.join(config.adapters)} as models of their own, whose path is the adapter's"
        )
    match config.engine:
        case "echo":
            from llava_ray.engine.echo import EchoEngine

            return EchoEngine(delay_s=config.echo_delay_s, template=config.template)
        case "torch":
            # OpenMP reads it when torch is loaded; Ray has set it to the actor's num_cpus.
            os.environ["OMP_NUM_THREADS"] = str(count_threads(config))
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
