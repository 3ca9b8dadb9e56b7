"""Serving on Ray Serve: HTTP request -> gateway -> backends -> replica -> server-sent events.

gateway/   the HTTP side: routes, API keys, rate limits, request log, metrics
backends/  the gateway's calls to replicas and to LLaVA's own workers; queues and streams
replica/   one engine per replica
openai/    the wire format of the OpenAI API     llava/  that of LLaVA's controller and workers
fetch/     images from URLs                      page/   the Gradio page
openai/, llava/ and fetch/ do not import Ray.
"""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.app import build_app, serve_models

__all__ = ["build_app", "serve_models"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {"build_app": "llava_ray.app", "serve_models": "llava_ray.app"},
)
