"""Loads, builds and exports LLaVA models, from any LLaVA checkpoint.

`load_model` and `LoadedModel` are imported from `loading` on first use, so that other parts of this
package can be imported without torch.
"""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.model.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {"LoadedModel": "llava_ray.model.loading", "load_model": "llava_ray.model.loading"},
)
