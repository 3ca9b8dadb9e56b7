"""Loads, builds and exports LLaVA models, from any LLaVA checkpoint.

`load_model` and `LoadedModel` are imported from `loading` on first use, so that other parts of this
package can be imported without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_ray.model.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llava_ray.model import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
