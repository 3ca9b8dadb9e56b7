"""The gateway's Prometheus metrics, which Ray exports on every node as `ray_llava_ray_*`."""

from ray.serve.metrics import Gauge
from ray.util.metrics import Counter, Histogram

from llava_ray.serve.request_context import RequestContext

_SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]


class Metrics:
    """The metrics of one gateway process."""

    def __init__(self) -> None:
        tags = ("key", "model")
        self._requests = Counter(
            "llava_ray_requests",
            "Finished requests; status 499: the client disconnected.",
            tag_keys=(*tags, "status", "error"),
        )
        self._tokens = Counter(
            "llava_ray_tokens",
            "Tokens by kind; prompt tokens include image and cached tokens.",
            tag_keys=(*tags, "kind"),
        )
        self._queued = Gauge(
            "llava_ray_queued_requests",
            "Requests that wait in a gateway for a free slot of the model.",
            tag_keys=("model",),
        )
        self._fetch = Histogram(
            "llava_ray_fetch_seconds",
            "Time to fetch a request's images from their URLs.",
            boundaries=_SECONDS,
            tag_keys=tags,
        )
        self._first = Histogram(
            "llava_ray_first_chunk_seconds",
            "Time from the arrival of a request to the first chunk of its answer.",
            boundaries=_SECONDS,
            tag_keys=tags,
        )
        self._total = Histogram(
            "llava_ray_request_seconds",
            "Time from the arrival of a request to the end of its answer.",
            boundaries=_SECONDS,
            tag_keys=tags,
        )

    def note_queued(self, model: str, num_waiting: int) -> None:
        """Set how many requests are waiting for a model in this gateway."""
        self._queued.set(num_waiting, {"model": model})

    def count_request(self, context: RequestContext) -> None:
        """Record a finished request."""
        tags = {"key": context.key, "model": context.model if context.is_model_known else ""}
        self._requests.inc(1, {**tags, "status": str(context.status), "error": context.error})
        used = context.usage
        for kind, count in (
            ("prompt", used.num_prompt_tokens),
            ("completion", used.num_tokens),
            ("image", used.num_image_tokens),
            ("cached", used.num_cached_tokens),
        ):
            if count:
                self._tokens.inc(count, {**tags, "kind": kind})
        if context.fetch_s is not None:
            self._fetch.observe(context.fetch_s, tags)
        if context.first_chunk_s is not None:
            self._first.observe(context.first_chunk_s, tags)
        self._total.observe(context.total_s, tags)
