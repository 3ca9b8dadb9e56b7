"""Engines turn prompts into streamed answers; `protocol.py` is the one seam in front of them."""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.engine.factory import load_engine

__all__ = ["load_engine"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {"load_engine": "llava_ray.engine.factory"},
)
