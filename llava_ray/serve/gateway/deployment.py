"""The gateway: the ingress deployment, which assembles routes and middleware. It needs no torch.

`openai_routes.py` has the routes of the OpenAI API, `llava_routes.py` those of LLaVA's protocol.
"""

import os
from collections.abc import Mapping

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from llava_ray.config import CLIENT_KEY_VARIABLE, PageConfig, ServeConfig
from llava_ray.errors import LlavaRayError
from llava_ray.serve import log
from llava_ray.serve.backends.stream_transport import StreamReceiver
from llava_ray.serve.gateway.auth import AccessControl, AuthMiddleware, Describe
from llava_ray.serve.gateway.llava_routes import PATHS, build_llava_app
from llava_ray.serve.gateway.metrics import Metrics
from llava_ray.serve.gateway.openai_routes import OpenAIRoutes
from llava_ray.serve.gateway.paths import WITHOUT_V1, PathMiddleware
from llava_ray.serve.gateway.request_log import RequestLogMiddleware
from llava_ray.serve.gateway.responses import answer_error, answer_no_route, answer_without_v1
from llava_ray.serve.gateway.usage_ledger import ExchangeCounts, open_ledger
from llava_ray.serve.llava.protocol import describe_llava_error
from llava_ray.serve.openai.errors import describe_error

_READ = ["GET", "HEAD"]
_ALL = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


@serve.ingress()
class Gateway:
    """The ingress deployment: the API, and the page if the configuration has it.

    Args:
        config: the application's configuration.
        models: for each model's name the handle of its `Replica` deployment.
        workers: the handle of the `WorkerRegistry` deployment; None: no workers may register.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Mapping[str, DeploymentHandle],
        workers: DeploymentHandle | None = None,
    ) -> None:
        log.set_up(in_replica=True)
        self._config = config
        self._models = models
        self._workers = workers

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the gateway's process, after the constructor."""
        exchange = open_ledger(serve.get_replica_context().app_name)
        api = build_api(self._config, self._models, self._workers, exchange, StreamReceiver())
        if self._config.page:
            self._hand_over_key()
            from llava_ray.serve.page import mount_page

            page = PageConfig(
                gateway_url=None,
                feedback_dir=self._config.feedback_dir,
                moderation=self._config.moderation,
            )
            api = mount_page(api, page)
        return api

    def _hand_over_key(self) -> None:
        """Set the environment variable from which the page, as a client, takes its key."""
        os.environ.pop(CLIENT_KEY_VARIABLE, None)
        if self._config.page_key:
            os.environ[CLIENT_KEY_VARIABLE] = self._config.page_key.get_secret_value()


def build_api(
    config: ServeConfig,
    models: Mapping[str, DeploymentHandle],
    workers: DeploymentHandle | None = None,
    exchange: ExchangeCounts | None = None,
    receiver: StreamReceiver | None = None,
) -> FastAPI:
    """Return the HTTP application, on which a page may be mounted.

    Args:
        config: the application's configuration.
        models: for each model's name the handle of its `Replica` deployment.
        workers: the handle of the `WorkerRegistry` deployment; None: no workers may register.
        exchange: reaches the usage ledger that all gateways share; None: one gateway.
        receiver: receives chunks that bypass Ray; None: all chunks come through Ray.
    """
    access = AccessControl(config, exchange)
    metrics = Metrics()
    routes = OpenAIRoutes(config, models, workers, access, metrics, receiver)
    v1 = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={LlavaRayError: answer_error, HTTPException: answer_no_route},
    )
    v1.add_api_route("/models", routes.list_models, methods=_READ)
    v1.add_api_route("/models/{name:path}", routes.get_model, methods=_READ)
    v1.add_api_route("/chat/completions", routes.chat, methods=["POST"])
    v1.add_api_route("/completions", routes.complete, methods=["POST"])
    v1.add_api_route("/tokenize", routes.tokenize, methods=["POST"])
    v1.add_api_route("/detokenize", routes.detokenize, methods=["POST"])
    v1.add_api_route("/usage", routes.show_usage, methods=_READ)
    _guard(v1, access, config, metrics)
    api = FastAPI(
        title="LLaVA Ray",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: answer_no_route},
    )
    api.add_middleware(PathMiddleware)
    api.add_api_route("/healthz", routes.check_liveness, methods=_READ)
    api.add_api_route("/readyz", routes.check_readiness, methods=_READ)
    api.add_api_route("/health", routes.check_readiness, methods=_READ)  # vLLM's name for it
    api.add_api_route("/openapi.json", routes.show_openapi, methods=_READ)
    api.mount("/v1", v1)
    for path in WITHOUT_V1:
        api.router.routes.append(Route(path, answer_without_v1, methods=_ALL))
    for path in ("/usage", "/tokenize", "/detokenize"):  # vLLM has the last two without /v1
        api.router.routes.append(Route(path, v1))
    if config.llava_protocol.enabled:
        llava = build_llava_app(config, routes.models, workers)
        _guard(llava, access, config, metrics, describe=describe_llava_error)
        api.router.routes += [Route(path, llava) for path in PATHS]
    return api


def _guard(
    api: Starlette,
    access: AccessControl,
    config: ServeConfig,
    metrics: Metrics,
    describe: Describe = describe_error,
) -> None:
    """Wrap an application in the request log, access control and CORS middleware."""
    api.add_middleware(AuthMiddleware, access=access, describe=describe)
    api.add_middleware(RequestLogMiddleware, metrics=metrics)
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["*"],
        )
