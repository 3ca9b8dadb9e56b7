"""Ray Serve deployments: the gateway (HTTP), the replicas (models) and the page."""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.app import build_app, serve_models

__all__ = ["build_app", "serve_models"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {"build_app": "llava_ray.app", "serve_models": "llava_ray.app"},
)
