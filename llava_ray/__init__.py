"""LLaVA as one Ray application: data, training, evaluation and serving of vision-language models.

    from llava_ray import LLaVA

    print(LLaVA("demo").chat("How many objects are there?", images=["scene.png"]))

Importing the package imports neither torch, Ray nor Gradio: each name is loaded when it is used.
"""

from llava_ray.lazy import make_lazy

TYPE_CHECKING = False  # type checkers take it for True; the import of `typing` would cost more
if TYPE_CHECKING:
    from llava_ray.client import Client
    from llava_ray.config import (
        ConvertConfig,
        EvaluateConfig,
        ModelConfig,
        ServeConfig,
        TrainConfig,
    )
    from llava_ray.errors import LlavaRayError
    from llava_ray.llava import LLaVA
    from llava_ray.model.loading import load_model

__version__ = "0.2.0"

__all__ = [
    "Client",
    "ConvertConfig",
    "EvaluateConfig",
    "LLaVA",
    "LlavaRayError",
    "ModelConfig",
    "ServeConfig",
    "TrainConfig",
    "__version__",
    "load_model",
]

__getattr__, __dir__ = make_lazy(
    __name__,
    {
        "Client": "llava_ray.client",
        "ConvertConfig": "llava_ray.config",
        "EvaluateConfig": "llava_ray.config",
        "LLaVA": "llava_ray.llava",
        "LlavaRayError": "llava_ray.errors",
        "ModelConfig": "llava_ray.config",
        "ServeConfig": "llava_ray.config",
        "TrainConfig": "llava_ray.config",
        "load_model": "llava_ray.model.loading",
    },
)
