"""What Prometheus reads at Ray's endpoint while a real application with API keys runs."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from tests.support.tiny_checkpoint import make_image, tiny_model
from tests.support.wait import PATIENCE_S, wait_until

pytestmark = pytest.mark.ray

BODY = {"model": "measured", "messages": [{"role": "user", "content": "one two three"}]}
KEYS = {name: f"lr-{name}-0123456789abcdef" for name in ("ann", "ben")}  # of this test alone
ANN = {"key": "ann", "model": "measured"}


@pytest.fixture(scope="module")
def measured(served: str) -> Iterator[str]:
    """Address of an application with keys."""
    from ray import serve

    from llava_ray.app import build_app
    from llava_ray.config import ModelConfig, ServeConfig

    keys = ",".join(f"{name}={key}" for name, key in KEYS.items())
    model = ModelConfig(path="measured", engine="echo", num_cpus=0.1, adapters={"mine": "folder"})
    slow = ModelConfig(
        path="slow", engine="echo", num_cpus=0.1, echo_delay_s=0.1, max_ongoing_requests=1
    )
    config = ServeConfig.model_validate({"models": [model, slow], "page": False, "api_keys": keys})
    serve.run(build_app(config), name="measured", route_prefix="/measured")
    yield f"{served}/measured"
    serve.delete("measured")


def read(name: str, labels: dict[str, str]) -> float:
    """Return the sum of a metric over all processes, for lines with these labels."""
    total = 0.0
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        families = text_string_to_metric_families(httpx.get(url, timeout=PATIENCE_S).text)
        for sample in (sample for family in families for sample in family.samples):
            if sample.name == name and labels.items() <= sample.labels.items():
                total += sample.value
    return total


@pytest.mark.slow
def test_what_each_key_used_is_scraped_and_told(measured: str) -> None:
    def call(method: str, path: str, name: str, **options: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEYS[name]}"}
        return httpx.request(
            method, measured + path, headers=headers, timeout=PATIENCE_S, **options
        )

    for name, fields, status in (
        ("ann", {}, 200),
        ("ann", {}, 200),
        ("ben", {}, 200),
        ("ben", {"model": "measured:mine"}, 200),
        ("ann", {"max_tokens": 0}, 400),
    ):
        reply = call("POST", "/v1/chat/completions", name, json=BODY | fields)
        assert reply.status_code == status
    refused = {"key": "ann", "status": "400", "error": "invalid_request"}
    for metric, labels, value in (
        ("ray_llava_ray_requests_total", {**ANN, "status": "200"}, 2),
        ("ray_llava_ray_requests_total", refused, 1),
        ("ray_llava_ray_requests_total", {"key": "ben", "status": "200"}, 2),
        ("ray_llava_ray_requests_total", {"key": "ben", "model": "measured:mine"}, 1),
        ("ray_llava_ray_tokens_total", {**ANN, "kind": "prompt"}, 10),
        ("ray_llava_ray_tokens_total", {**ANN, "kind": "completion"}, 10),
        ("ray_llava_ray_first_chunk_seconds_count", ANN, 2),
        ("ray_llava_ray_request_seconds_count", ANN, 2),
    ):
        wait_until(
            lambda: read(metric, labels) == value,  # noqa: B023
            f"{metric} with {labels} is {value}",
        )
    usage = call("GET", "/usage", "ann").json()
    assert usage["complete"]
    (own,) = usage["data"]
    assert (own["key"], own["requests"], own["errors"]) == ("ann", 3, 1)
    assert own["total_tokens"] == 20


@pytest.mark.slow
def test_what_waits_in_a_gateway_is_scraped(measured: str) -> None:
    header = {"Authorization": f"Bearer {KEYS['ben']}"}
    body = {**BODY, "model": "slow", "stream": True, "ignore_eos": True}
    behind = [0, 1]  # the second who is answered, and the first

    def ask(_: int) -> None:
        """Start an endless answer, and close it once the metrics show that requests are waiting."""
        url = f"{measured}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=header, timeout=PATIENCE_S) as reply:
            assert reply.status_code == 200
            num_behind = behind.pop()
            wait_until(lambda: count_queued() == num_behind, f"{num_behind} requests wait")

    def count_queued() -> float:
        return read("ray_llava_ray_queued_requests", {"model": "slow", "application": "measured"})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, range(2)))
    assert not behind


@pytest.fixture
def seeing(served: str) -> Iterator[str]:
    """Address of an application with a tiny model on the torch engine."""
    from ray import serve

    from llava_ray.app import build_app
    from llava_ray.config import ModelConfig, ServeConfig

    model = ModelConfig(name="tiny", path=str(tiny_model()), dtype="float32", num_cpus=0.5)
    serve.run(
        build_app(ServeConfig(models=[model], page=False)), name="seeing", route_prefix="/seeing"
    )
    yield f"{served}/seeing"
    serve.delete("seeing")


def test_an_image_that_is_asked_about_twice_is_encoded_once(seeing: str) -> None:
    file = io.BytesIO()
    make_image().save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 2}
    for _ in range(2):
        reply = httpx.post(f"{seeing}/v1/chat/completions", json=body, timeout=PATIENCE_S)
        assert reply.status_code == 200, reply.text
    for name, kind, value in (
        ("images_total", {"kind": "encoded"}, 1),
        ("images_total", {"kind": "cached"}, 1),
        ("encode_seconds_count", {}, 1),
        ("decode_seconds_count", {}, 2),
        ("render_seconds_count", {}, 2),
    ):
        labels = {"application": "seeing", **kind}
        wait_until(
            lambda: read(f"ray_llava_ray_replica_{name}", labels) == value,  # noqa: B023
            f"{name} with {labels} is {value}",
        )


@ray.remote(num_cpus=0)
class Run:
    """Exports the metrics of a training run's first worker."""

    def write(self) -> None:
        from llava_ray.train.trackers import RayMetrics

        self.metrics = RayMetrics("tiny-run")
        figures = {"loss": 2.5, "mfu": 0.25, "tokens_per_s": 900.0, "wait_s": 0.125}
        self.metrics.write(figures, step=7)


@pytest.mark.slow
def test_what_a_training_run_says_is_scraped(cluster: None) -> None:
    run = Run.remote()
    ray.get(run.write.remote())
    for name, value in (("step", 7), ("mfu", 0.25), ("tokens_per_s", 900), ("wait_s", 0.125)):
        wait_until(
            lambda: read(f"ray_llava_ray_train_{name}", {"run": "tiny-run"}) == value,  # noqa: B023
            f"{name} is {value}",
        )
    ray.kill(run)
