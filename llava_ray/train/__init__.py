"""Training: full, LoRA or projector, on any number of workers, with DeepSpeed's ZeRO.

settings (YAML) -> preflight (checks) -> launch (Ray Train: workers, failures, storage)
-> worker (one process) -> loop: batches from `data.loader.stream` -> train_step (token-weighted
loss) -> DeepSpeed -> checkpoint -> run_folder (export, curves)

`launch`, `worker` and `trackers` import Ray. The loop does not: it runs in any process in which
torch.distributed is initialized.
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
