"""The multimodal core: any LLaVA checkpoint in, a model and its processor out; building, exporting.

`load_model` and its `Core` are taken from `loading` when they are asked for, so that parts of this
package can be imported without torch.
"""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.model.loading import Core, load_model

__all__ = ["Core", "load_model"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {"Core": "llava_ray.model.loading", "load_model": "llava_ray.model.loading"},
)
