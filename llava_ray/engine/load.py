"""Configuration -> a running engine: the one place that knows which engines there are."""

import os

from llava_ray.config import ModelConfig
from llava_ray.engine.protocol import Engine
from llava_ray.errors import ConfigError


def load_engine(config: ModelConfig) -> Engine:
    """Load a model and start the engine that the configuration names.

    Each engine's packages are imported only when that engine is asked for.

    Raises:
        ConfigError: the model does not load, or the engine is not available here.
    """
    match config.engine:
        case "echo":
            from llava_ray.engine.echo import EchoEngine

            return EchoEngine(template=config.template)
        case "torch":
            # OpenMP reads it when torch is loaded; Ray has set it to the actor's num_cpus.
            num_threads = config.num_threads or len(os.sched_getaffinity(0))
            os.environ["OMP_NUM_THREADS"] = str(num_threads)
            from llava_ray.engine.torch_engine import TorchEngine

            return TorchEngine.load(config)
        case "vllm" | "sglang":
            raise ConfigError(
                f"engine={config.engine!r} is not available in this version: "
                "use engine='torch', which computes on CPU and GPU"
            )
