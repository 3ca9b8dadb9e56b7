"""Mounts the page, or builds it as a Serve application of its own.

mount_page(api, config) adds it to the gateway's application at `/`; build_app(PageConfig) makes a
separate application for a Serve config file. Gradio is only imported in mount_page.
"""

import os

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.middleware import Middleware

from llava_ray.config import LimitsConfig, PageConfig
from llava_ray.serve.page.store import make_store
from llava_ray.serve.page.style import CSS, FONTS, MONO_FONTS


def build_app(config: PageConfig) -> Application:
    """Build the application for a Serve config file: one replica, under any route prefix."""
    page = serve.deployment(
        name="page",
        max_ongoing_requests=1000,
        health_check_period_s=2,  # time until a dead page is noticed
        graceful_shutdown_timeout_s=LimitsConfig().drain_s,  # the gateway's default
        ray_actor_options={"num_cpus": 0},
    )(Page)
    return page.bind(config)


@serve.ingress()
class Page:
    """Serves only the page, from one replica, because uploads and streams live in its process."""

    def __init__(self, config: PageConfig) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        return mount_page(api, self._config)


def mount_page(api: FastAPI, config: PageConfig) -> FastAPI:
    """Serve the page at `/` of an application, whose own routes take precedence.

    Args:
        api: the application, which is modified and returned.
        config: the page's configuration; without a `gateway_url` the page calls its own server.

    Raises:
        ConfigError: the feedback folder is not writable.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    # Otherwise Gradio rebuilds an unused table of its last 10,000 events at every event.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(1 << 60))
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
    # If pages shared a folder, the first one to end would delete the images of all.
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = make_store()
    import gradio as gr

    from llava_ray.serve.page.handlers import Handlers
    from llava_ray.serve.page.layout import build_layout
    from llava_ray.serve.page.upload_guard import MAX_UPLOAD_BYTES, UploadGuard
    from llava_ray.serve.page.wiring import wire

    handlers = Handlers(config)
    layout = build_layout(config)
    wire(layout, handlers)
    # Without this, Gradio reads any file whose path a visitor sends.
    layout.page.has_launched = True
    theme = gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS
    )
    return gr.mount_gradio_app(
        api,
        layout.page,
        path="/",
        app_kwargs={"middleware": [Middleware(UploadGuard)]},
        root_path=config.root_path,
        enable_monitoring=False,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_UPLOAD_BYTES,
    )
