"""Puts the page where it is asked for.

mount_page(api, config) puts it on the gateway's own application at `/`; build_app(PageConfig) makes
it an application of its own for a Serve config file. Gradio is first imported here, in mount_page.
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
    """Return the bound application for a Serve config file: one replica, under any prefix."""
    page = serve.deployment(
        name="page",
        max_ongoing_requests=1000,
        health_check_period_s=2,  # one that died is missed no longer
        graceful_shutdown_timeout_s=LimitsConfig().drain_s,  # of the gateway, unless it was set
        ray_actor_options={"num_cpus": 0},
    )(Page)
    return page.bind(config)


@serve.ingress()
class Page:
    """Serves the page alone. One replica: uploads and open streams live in its process."""

    def __init__(self, config: PageConfig) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        return mount_page(api, self._config)


def mount_page(api: FastAPI, config: PageConfig) -> FastAPI:
    """Serve the page at `/` of an application whose own routes go before it.

    Args:
        api: the application; it is changed and returned.
        config: the page's; without a `gateway_url` the gateway is where the page is asked for.

    Raises:
        ConfigError: the folder of the log cannot be written to.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    # Or Gradio makes a table of its last 10,000 events at every event, for nobody.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(1 << 60))
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
    # A folder that pages share would lose the images of all with the first page that ends.
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
    # Without this Gradio takes any path that a visitor names for a file of theirs, and reads it.
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
