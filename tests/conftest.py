"""One small Ray cluster and one application for all tests that talk to a server."""

import os
import re
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Ray reads these when it is imported. Without the first, a token file that an earlier cluster left
# in the home folder decides whether this one can be reached.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of the future
# Serve kills a proxy that is not up after five seconds, as happens on a busy machine.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
# Ray Train hears of one checkpoint at each of these checks; tests have one every second.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ALLOWED_WARNINGS = (
    "ignore:Using extra keyword arguments on `Field`",  # Ray Serve's schema, with pydantic 2
    r"ignore::DeprecationWarning:ray\.data",  # of its own settings, whenever it copies them
    # asyncio leaves the transports of TLS handshakes that failed to the garbage collector
    "ignore:Exception ignored in. <(function _S(elector|SLProtocol)Transport|socket.socket)"
    ":pytest.PytestUnraisableExceptionWarning",
    "ignore:subprocess .* is still running:ResourceWarning",  # Ray does not wait for its own
)


ON_RAY = re.compile(
    r"\b(cluster|served)\b[,:)]|^from (ray_nodes|hosts) |COMMAND, \"serve\"|nbclient", re.MULTILINE
)
"""Is in the text of files whose tests use the session's Ray, or start one of their own."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `-n 2`, let one process take all that runs on Ray, the other what computes by itself.

    So Rays start one after the other: Ray gives up a node whose agent takes more than 15 seconds,
    as it does where several start. Tests of a file stay together.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if is_on_ray(config.rootpath / file) else file

    return Scheduler(config, log)


@cache
def is_on_ray(file: Path) -> bool:
    return bool(ON_RAY.search(file.read_text()))


def pytest_configure(config: pytest.Config) -> None:
    for line in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def _certificates_are_read_once() -> Iterator[None]:
    """httpx reads them for every client, which takes 40 ms and most of the time of a request."""
    from httpx._transports import default

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default, "create_ssl_context", cache(default.create_ssl_context))
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray for the session, with two CPUs whatever the machine has."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def served(cluster: None) -> Iterator[str]:
    """Address of the real application, without a slash at its end.

    Models: `echo` and `other` say back what they hear (`llava_ray.engine.echo`), `other` a word
    each millisecond. Page at `/`.
    """
    from ray import serve

    from llava_ray.app import build_app
    from llava_ray.config import ModelConfig, ServeConfig

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    kind: dict[str, Any] = {"engine": "echo", "num_cpus": 0.1, "messages_per_s": 10**9}
    models = [
        ModelConfig(path="echo", **kind),
        ModelConfig(path="other", echo_delay_s=0.001, **kind),
    ]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(ServeConfig(models=models)), name="app", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
