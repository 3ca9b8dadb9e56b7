"""Training: any LLaVA, on any number of workers, with DeepSpeed's ZeRO.

settings (a YAML) -> launch (Ray Train: workers, failures, storage) -> loop: batches from
`data.stream` -> token-weighted loss -> DeepSpeed -> checkpoint: resume | export

Only `launch` knows Ray; the loop runs in any process that torch.distributed knows of.
"""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.evaluate.during_training import train_model

__all__ = ["train_model"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {"train_model": "llava_ray.evaluate.during_training"},
)
