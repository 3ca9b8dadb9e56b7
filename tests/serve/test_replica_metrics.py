"""What a replica measures, and the dashboard that shows it."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.util.metrics import Counter, Histogram, Metric

from llava_ray.config import LimitsConfig, ModelConfig
from llava_ray.serve.gateway.metrics import Metrics
from llava_ray.serve.replica.deployment import Replica
from llava_ray.serve.replica.metrics import ReplicaMetrics
from llava_ray.train.trackers import RayMetrics
from llava_ray.types import ChatRequest, Message, Sampling, TextPart

DASHBOARD = Path(__file__).parents[2] / "jobs" / "configs" / "grafana.json"


def find_metrics(metrics: ReplicaMetrics | Metrics | RayMetrics) -> Iterator[Metric]:
    for value in vars(metrics).values():
        values = value.values() if isinstance(value, dict) else [value]
        yield from (each for each in values if isinstance(each, Metric))


def list_series(metric: Metric) -> set[str]:
    """Return the names of a metric's series in Prometheus."""
    name = f"ray_{metric.info['name']}"
    if isinstance(metric, Histogram):
        return {f"{name}_{part}" for part in ("bucket", "count", "sum")}
    return {f"{name}_total"} if isinstance(metric, Counter) else {name}


def test_the_dashboard_shows_the_metrics_that_there_are_and_no_others() -> None:
    owners = (ReplicaMetrics(), Metrics(), RayMetrics("run"))
    metrics = [metric for owner in owners for metric in find_metrics(owner)]
    have = set().union(*map(list_series, metrics))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"ray_\w+", query)}
    assert asked <= have
    assert {name.rsplit("_", 1)[0] for name in have} == {n.rsplit("_", 1)[0] for n in asked}


def test_the_figures_of_the_engine_that_are_shown_are_those_that_it_has() -> None:
    replica = Replica(ModelConfig(path="echo", engine="echo"), LimitsConfig())
    asyncio.run(replica.check_health())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Serve's log, which does not propagate in a process that runs Serve."""
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("sampling", "end"), [(Sampling(), "stop"), (Sampling(max_tokens=1), "length")]
)
def test_a_request_is_logged_with_its_id_and_its_end(
    sampling: Sampling, end: str, log: pytest.LogCaptureFixture
) -> None:
    asyncio.run(listen(sampling))
    assert f"chatcmpl-7 ended: {end}" in log.text


def test_a_request_that_is_refused_is_logged_with_the_error(
    log: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(Exception, match="context holds"):
        asyncio.run(listen(Sampling(max_tokens=10**9)))
    assert "chatcmpl-7 ended: context_length_exceeded" in log.text


async def listen(sampling: Sampling) -> None:
    replica = Replica(ModelConfig(path="echo", engine="echo"), LimitsConfig())
    question = Message("user", (TextPart("one two three"),))
    request = ChatRequest("chatcmpl-7", "echo", (question,), sampling)
    async for _ in replica.chat(request):
        pass
