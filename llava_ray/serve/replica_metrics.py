"""What a replica measures, which Ray exports on every node as `ray_llava_ray_replica_*`.

The tags say which application, deployment and replica. `jobs/configs/grafana.json` shows them.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.serve.metrics import Counter, Gauge, Histogram

from llava_ray.errors import LlavaRayError
from llava_ray.types import Chunk

logger = logging.getLogger("ray.serve")  # writes each line with the request's id

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
_GAP_SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5]
_STATS = {
    "num_running": "Requests that the engine computes.",
    "num_waiting": "Requests that wait for a place in the engine.",
    "cache_tokens_used": "Tokens in the key-value cache.",
    "cache_tokens_total": "Tokens that the key-value cache holds at most.",
}


class Progress:
    """One request on its way through a replica."""

    def __init__(self, metrics: "ReplicaMetrics") -> None:
        self._metrics = metrics
        self._started_at = time.monotonic()
        self._noted_at = 0.0
        self.last: Chunk | None = None

    def note_piece(self, chunk: Chunk) -> None:
        """A piece of the answer goes out; `chunk` is the last that is joined in it."""
        now = time.monotonic()
        if self.last is None:
            self._metrics.first.observe(now - self._started_at)
        elif num_new := chunk.num_tokens - self.last.num_tokens:
            self._metrics.gap.observe((now - self._noted_at) / num_new)
        self._noted_at, self.last = now, chunk


class ReplicaMetrics:
    """The figures of this process."""

    def __init__(self) -> None:
        self.first = Histogram(
            "llava_ray_replica_first_token_seconds",
            "From a request's arrival at the replica to the first piece of its answer.",
            boundaries=_SECONDS,
        )
        self.gap = Histogram(
            "llava_ray_replica_token_gap_seconds",
            "Time for each token after the first.",
            boundaries=_GAP_SECONDS,
        )
        self._render = Histogram(
            "llava_ray_replica_render_seconds",
            "Decoding a request's pictures and rendering its prompt, with the wait for a thread.",
            boundaries=_SECONDS,
        )
        self._requests = Counter(
            "llava_ray_replica_requests",
            "Requests that are over, by how they ended: stop, length, left or an error's code.",
            tag_keys=("end",),
        )
        self._tokens = Counter(
            "llava_ray_replica_tokens",
            "Tokens of answered requests: text, image and cached of prompts, and generated.",
            tag_keys=("kind",),
        )
        self._stats = {
            name: Gauge(f"llava_ray_replica_{name}", description)
            for name, description in _STATS.items()
        }

    def note_stats(self, stats: dict[str, float]) -> None:
        """Take the engine's figures of this moment; see `Engine.stats`."""
        for name, gauge in self._stats.items():
            gauge.set(stats[name])

    def note_render(self, seconds: float) -> None:
        self._render.observe(seconds)

    @contextmanager
    def follow(self, request_id: str) -> Iterator[Progress]:
        """Count the request that the block answers, and log how it ended."""
        progress = Progress(self)
        end = "left"
        try:
            yield progress
            end = (progress.last and progress.last.finish_reason) or end
        except LlavaRayError as error:
            end = error.code
            raise
        except Exception:
            end = "internal_error"
            raise
        finally:
            self._requests.inc(1, {"end": end})
            num_tokens = self._count_tokens(progress.last) if progress.last else 0
            logger.info(f"{request_id} ended: {end}, {num_tokens} new tokens")

    def _count_tokens(self, last: Chunk) -> int:
        kinds = {
            "text": last.num_prompt_tokens - last.num_image_tokens,
            "image": last.num_image_tokens,
            "cached": last.num_cached_tokens,
            "generated": last.num_tokens,
        }
        for kind, count in kinds.items():
            if count:
                self._tokens.inc(count, {"kind": kind})
        return last.num_tokens
