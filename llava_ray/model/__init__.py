"""The multimodal core: any LLaVA checkpoint in, a model and its processor out; building, exporting.

`load_model` and its `Core` are taken from `loading` when they are asked for, so that parts of this
package can be imported without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_ray.model.loading import Core, load_model

__all__ = ["Core", "load_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llava_ray.model import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
