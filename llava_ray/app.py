"""The Serve application: `serve run llava_ray.app:deployment`, then open http://localhost:8000.

The application is one `Gateway` deployment (HTTP and the page, no torch) in front of one `Replica`
deployment per model. Ray Serve scales each deployment on its own.
"""

import signal
from collections.abc import Sequence

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from llava_ray.cluster import choose_num_gpus, count_gpus
from llava_ray.config import LlavaProtocolConfig, ModelConfig, ServeConfig
from llava_ray.errors import ConfigError
from llava_ray.priority import give_way, slow_down_serve
from llava_ray.serve import log
from llava_ray.serve.address import check_port, describe_address, find_open_door
from llava_ray.serve.gateway.deployment import Gateway
from llava_ray.serve.llava.worker_registry import WorkerRegistry
from llava_ray.serve.replica.deployment import Replica

_QUIET = LoggingConfig(enable_access_log=False)


def build_app(config: ServeConfig) -> Application:
    """Build the application; Serve config files and `serve run ... key=value` call this."""
    address = describe_address("127.0.0.1", 8000, has_page=config.page)
    return _bind_app(config, f"{address}, unless Serve listens elsewhere")


def _bind_app(config: ServeConfig, address: str) -> Application:
    """Build the application; `address` says where it will be."""
    log.set_up()
    if not ray.is_initialized():
        give_way()  # inherited by the Ray processes started next
        slow_down_serve()
    for model in config.models:
        log.logger.info(f"serving {model.name!r} ({model.path}) with the {model.engine} engine")
    log.logger.info(f"starting Ray takes about 15 s; then {address}")
    models = {model.name: _bind_model(model, config) for model in _choose_gpus(config.models)}
    workers = _bind_workers(config.llava_protocol) if config.llava_protocol.workers else None
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.num_gateways,
        # Room for the page's open streams and health checks beside the API's requests.
        max_ongoing_requests=config.limits.max_in_flight + 1000,
        health_check_period_s=2,  # a dead gateway is noticed within this time
        graceful_shutdown_timeout_s=config.limits.drain_s,
        ray_actor_options={"num_cpus": 0},
        logging_config=_QUIET,
    )(Gateway)
    return gateway.bind(config, models, workers)


def serve_models(config: ServeConfig, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve models as `llava-ray serve` does, until Ctrl-C or SIGTERM; then shut Serve down.

    Ray is started if none is running. Call it from the main thread, which receives the signals.

    Args:
        config: what is served.
        host: the address to listen on; "0.0.0.0" lets other machines in.
        port: of the API and the page.

    Raises:
        ConfigError: the port is taken, or Serve runs on this Ray cluster at another address.
    """
    check_port(host, port)
    log.set_up()
    if warning := find_open_door(host, has_keys=bool(config.api_keys)):
        log.logger.warning(warning)
    address = describe_address(host, port, has_page=config.page)
    application = _bind_app(config, address)
    _start_serve(host, port)
    # Ray's own handler, which `start` installs, aborts the process.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.run(application)
        log.logger.info(f"ready: {address}; Ctrl-C ends it")
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_serve(host: str, port: int) -> None:
    """Start Serve at an address; a Serve that runs already keeps its own, which is an error."""
    serve.start(http_options={"host": host, "port": port})
    client = _get_global_client()
    assert client is not None  # `start` has made it
    found = client.http_config
    if (found.host, found.port) != (host, port):
        raise ConfigError(
            f"Ray Serve runs on this Ray cluster already, at {found.host}:{found.port}: add "
            "applications to it with `serve deploy`, or end it with `serve shutdown -y`"
        )


def _choose_gpus(models: Sequence[ModelConfig]) -> list[ModelConfig]:
    """Return the models with a number of GPUs; warn where the cluster has too few for all."""
    numbers = [choose_num_gpus(model.num_gpus, if_any=model.gpus_if_any) for model in models]
    needed = sum(max(1, model.min_replicas) * n for model, n in zip(models, numbers, strict=True))
    if needed and (present := count_gpus()) < needed:
        log.logger.warning(
            f"the models need {needed:g} GPUs, and the cluster has or can start {present:g}: some "
            "replicas will wait for ever. Set num_gpus below 1 for models that share a GPU, or "
            "serve fewer"
        )
    return [
        model.model_copy(update={"num_gpus": number})
        for model, number in zip(models, numbers, strict=True)
    ]


def _bind_model(model: ModelConfig, config: ServeConfig) -> Application:
    replica = serve.deployment(
        name=model.name,
        # Each gateway has all slots of a replica: Serve does not queue fairly among gateways.
        max_ongoing_requests=model.max_ongoing_requests * config.num_gateways,
        max_queued_requests=model.max_queued_requests,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.limits.drain_s,
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
        logging_config=_QUIET,
        autoscaling_config=AutoscalingConfig(
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            target_ongoing_requests=model.target_ongoing_requests,
        ),
    )(Replica)
    return replica.bind(model, config.limits)


def _bind_workers(config: LlavaProtocolConfig) -> Application:
    workers = serve.deployment(
        name="llava-workers",  # one replica, so that all gateways see the same workers
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        logging_config=_QUIET,
    )(WorkerRegistry)
    return workers.bind(config)


def __getattr__(name: str) -> Application:
    """Build `deployment` on first access, so that importing this module has no side effects."""
    if name == "deployment":
        return build_app(ServeConfig())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
