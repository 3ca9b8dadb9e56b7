"""Settings for the whole test session, one small Ray cluster, and one served application.

Tests that need Ray use the fixture `cluster`; tests that talk to a server use `served`.
"""

import ast
import os
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Ray reads these when it is imported. Without the first, a token file that an earlier cluster left
# in the home folder would decide whether this cluster can be reached.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # avoids a FutureWarning
# By default Serve kills a proxy that is not ready within five seconds, too short on a busy machine.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
# Ray Train handles one reported checkpoint per health check; tests save one every second.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

# GNU readline, which pytest loads, sets it to 80 for the processes of xdist.
os.environ.pop("COLUMNS", None)

if "PYTEST_XDIST_WORKER" in os.environ:  # two test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ALLOWED_WARNINGS = (
    "ignore:Using extra keyword arguments on `Field`",  # Ray Serve's schema, with pydantic 2
    r"ignore::DeprecationWarning:ray\.data",  # Ray Data copies its own deprecated settings
    # asyncio leaves the transports of failed TLS handshakes to the garbage collector
    "ignore:Exception ignored in. <(function _S(elector|SLProtocol)Transport|socket.socket)"
    ":pytest.PytestUnraisableExceptionWarning",
    "ignore:subprocess .* is still running:ResourceWarning",  # Ray waits for none of its own
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`, run all files that need Ray in one process and everything else in the other.

    Two Rays must not start at once: Ray gives up on a node whose agent needs more than 15 seconds.
    Tests of one file stay together.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if has_ray_marker(config.rootpath / file) else file

    return Scheduler(config, log)


@cache
def has_ray_marker(file: Path) -> bool:
    """Whether a test file uses the marker `ray`, on a test or in its `pytestmark`."""
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.ray"
        for node in ast.walk(ast.parse(file.read_text()))
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that uses the session's Ray in a file without the marker `ray`."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) and not has_ray_marker(item.path):
            raise pytest.UsageError(f"{item.path} uses `cluster`: give it pytest.mark.ray")


def pytest_configure(config: pytest.Config) -> None:
    for line in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def _certificates_are_read_once() -> Iterator[None]:
    """Load TLS certificates once: httpx loads them for every client, which is slow."""
    from httpx._transports import default

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default, "create_ssl_context", cache(default.create_ssl_context))
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray cluster for the session, with two CPUs on every machine."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def served(cluster: None) -> Iterator[str]:
    """Base URL of the real application, without a trailing slash.

    It serves two models that repeat the question (`llava_ray.engine.echo`): `echo` at once and
    `other` at one word per millisecond. The page is at `/`.
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
