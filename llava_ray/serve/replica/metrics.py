"""A replica's Prometheus metrics, which Ray exports on every node as `ray_llava_ray_replica_*`.

Tags name the application, deployment and replica. `jobs/configs/grafana.json` is a dashboard.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from llava_ray.errors import LlavaRayError
from llava_ray.serve.usage import Usage, count_usage
from llava_ray.types import Chunk, CompletionRequest, Request

logger = logging.getLogger(
    "ray.serve"
)  # Serve's log file only: the terminal has the gateway's line

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
_STEP_SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5]
_STATS = {
    "num_running": "Requests that the engine is computing.",
    "num_waiting": "Requests that wait for a free slot in the engine.",
    "cache_tokens_used": "Tokens in the key-value cache.",
    "cache_tokens_total": "Capacity of the key-value cache in tokens.",
}


_ENGINE_TAGS: Any = ("engine", "device", "dtype", "attention", "graphs", "cache", "batch")


class RequestTracker:
    """Measures one request in a replica."""

    def __init__(self, metrics: "ReplicaMetrics") -> None:
        self._metrics = metrics
        self._started_at = time.monotonic()
        self._noted_at: dict[int, float] = {}
        self.latest: dict[int, Chunk] = {}  # by answer

    def note_chunk(self, chunk: Chunk) -> None:
        """Record that a (joined) chunk of an answer is sent."""
        now = time.monotonic()
        if before := self.latest.get(chunk.answer):
            if num_new := chunk.num_tokens - before.num_tokens:
                self._metrics.gap.observe((now - self._noted_at[chunk.answer]) / num_new)
        elif not self.latest:
            self._metrics.first.observe(now - self._started_at)
        self._noted_at[chunk.answer], self.latest[chunk.answer] = now, chunk

    def describe_end(self, num_answers: int) -> str:
        """Return how a request without an error ended: its last finish reason, or "left"."""
        ends = [chunk.finish_reason for chunk in self.latest.values() if chunk.finish_reason]
        return ends[-1] if len(ends) == num_answers else "left"


class ReplicaMetrics:
    """The metrics of this replica process."""

    def __init__(self) -> None:
        self.first = Histogram(
            "llava_ray_replica_first_token_seconds",
            "Time from a request's arrival at the replica to the first chunk of its answer.",
            boundaries=_SECONDS,
        )
        self.gap = Histogram(
            "llava_ray_replica_token_gap_seconds",
            "Time per token after the first.",
            boundaries=_STEP_SECONDS,
        )
        self._decode = Histogram(
            "llava_ray_replica_decode_seconds",
            "Time to decode one image.",
            boundaries=_STEP_SECONDS,
        )
        self._render = Histogram(
            "llava_ray_replica_render_seconds",
            "Time to decode a request's images and render its prompt, with the wait for a thread.",
            boundaries=_SECONDS,
        )
        self._encode = Histogram(
            "llava_ray_replica_encode_seconds",
            "Time of the vision tower for the images of one step.",
            boundaries=_STEP_SECONDS,
        )
        self._images = Counter(
            "llava_ray_replica_images",
            "Images in prompts by kind: encoded, or cached (no encoding needed).",
            tag_keys=("kind",),
        )
        self._requests = Counter(
            "llava_ray_replica_requests",
            "Finished requests by how they ended: stop, length, left (cancelled) or an error code.",
            tag_keys=("end",),
        )
        self._tokens = Counter(
            "llava_ray_replica_tokens",
            "Tokens by kind: text, image and cached prompt tokens, and generated tokens.",
            tag_keys=("kind",),
        )
        self._engine = Gauge(
            "llava_ray_replica_engine",
            "Always 1; its tags say how the replica's engine computes.",
            tag_keys=_ENGINE_TAGS,
        )
        self._stats = {
            name: Gauge(f"llava_ray_replica_{name}", description)
            for name, description in _STATS.items()
        }

    def note_stats(self, stats: dict[str, float]) -> None:
        """Set the gauges to the engine's current statistics; see `Engine.stats`."""
        for name, gauge in self._stats.items():
            gauge.set(stats[name])

    def note_engine(self, described: dict[str, str]) -> None:
        """Set the gauge that says how the engine computes; see `Engine.describe`."""
        tags = {name: described.get(name, "") for name in _ENGINE_TAGS}
        self._engine.set(1, tags)

    def note_decode(self, seconds: float) -> None:
        self._decode.observe(seconds)

    def note_render(self, seconds: float) -> None:
        self._render.observe(seconds)

    def note_images(self, num_encoded: int, num_cached: int, seconds: float) -> None:
        """Record the images of a step; see `NoteImages`."""
        if num_encoded:
            self._encode.observe(seconds)
        for kind, count in (("encoded", num_encoded), ("cached", num_cached)):
            if count:
                self._images.inc(count, {"kind": kind})

    @contextmanager
    def track(self, request: Request | CompletionRequest) -> Iterator[RequestTracker]:
        """Measure the request that the block answers, and log how it ended."""
        tracker = RequestTracker(self)
        end = ""
        try:
            yield tracker
        except LlavaRayError as error:
            end = error.code
            raise
        except Exception:
            end = "internal_error"
            raise
        finally:
            end = end or tracker.describe_end(request.num_answers)
            self._requests.inc(1, {"end": end})
            used = count_usage(tracker.latest.values(), answers_each=_answers_each(request))
            self._count_tokens(used)
            logger.info(f"{request.request_id} ended: {end}, {used.num_tokens} new tokens")

    def _count_tokens(self, used: Usage) -> None:
        kinds = {
            "text": used.num_prompt_tokens - used.num_image_tokens,
            "image": used.num_image_tokens,
            "cached": used.num_cached_tokens,
            "generated": used.num_tokens,
        }
        for kind, count in kinds.items():
            if count:
                self._tokens.inc(count, {"kind": kind})


def _answers_each(request: Request | CompletionRequest) -> int:
    is_completion = isinstance(request, CompletionRequest)
    return request.answers_each if is_completion else request.num_answers
