"""Configuration -> a running engine: the one place that knows which engines there are."""

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

            return EchoEngine()
        case "torch":
            from llava_ray.engine.torch_engine import TorchEngine

            return TorchEngine.load(config)
        case "vllm" | "sglang":
            raise ConfigError(
                f"engine={config.engine!r} is not available in this version: "
                "use engine='torch', which computes on CPU and GPU"
            )
