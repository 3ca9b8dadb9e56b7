"""What a replica measures, which Ray exports on every node as `ray_llava_ray_replica_*`.

The tags say which application, deployment and replica. `jobs/configs/grafana.json` shows them.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.serve.metrics import Counter, Gauge, Histogram

from llava_ray.errors import LlavaRayError
from llava_ray.types import Chunk, CompletionRequest, Request, Usage, count_usage

logger = logging.getLogger("ray.serve")  # its file alone: a terminal has the gateway's line

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
_STEP_SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5]
_STATS = {
    "num_running": "Requests that the engine computes.",
    "num_waiting": "Requests that wait for a place in the engine.",
    "cache_tokens_used": "Tokens in the key-value cache.",
    "cache_tokens_total": "Tokens that the key-value cache holds at most.",
}


class RequestTracker:
    """One request on its way through a replica."""

    def __init__(self, metrics: "ReplicaMetrics") -> None:
        self._metrics = metrics
        self._started_at = time.monotonic()
        self._noted_at: dict[int, float] = {}
        self.latest: dict[int, Chunk] = {}  # of each answer

    def note_chunk(self, chunk: Chunk) -> None:
        """A piece of an answer goes out; `chunk` is the last that is joined in it."""
        now = time.monotonic()
        if before := self.latest.get(chunk.answer):
            if num_new := chunk.num_tokens - before.num_tokens:
                self._metrics.gap.observe((now - self._noted_at[chunk.answer]) / num_new)
        elif not self.latest:
            self._metrics.first.observe(now - self._started_at)
        self._noted_at[chunk.answer], self.latest[chunk.answer] = now, chunk

    def tell_end(self, num_answers: int) -> str:
        """Return how the request ended that no error ended: as its last answer, or left alone."""
        ends = [chunk.finish_reason for chunk in self.latest.values() if chunk.finish_reason]
        return ends[-1] if len(ends) == num_answers else "left"


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
            boundaries=_STEP_SECONDS,
        )
        self._decode = Histogram(
            "llava_ray_replica_decode_seconds",
            "Decoding one image.",
            boundaries=_STEP_SECONDS,
        )
        self._render = Histogram(
            "llava_ray_replica_render_seconds",
            "Decoding a request's images and rendering its prompt, with the wait for a thread.",
            boundaries=_SECONDS,
        )
        self._encode = Histogram(
            "llava_ray_replica_encode_seconds",
            "The vision tower's work on the images that one step encodes.",
            boundaries=_STEP_SECONDS,
        )
        self._images = Counter(
            "llava_ray_replica_images",
            "Images of prompts: encoded, or cached, which needed no encoding.",
            tag_keys=("kind",),
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

    def note_decode(self, seconds: float) -> None:
        self._decode.observe(seconds)

    def note_render(self, seconds: float) -> None:
        self._render.observe(seconds)

    def note_images(self, num_encoded: int, num_cached: int, seconds: float) -> None:
        """Take what became of a step's new images; see `NoteImages`."""
        if num_encoded:
            self._encode.observe(seconds)
        for kind, count in (("encoded", num_encoded), ("cached", num_cached)):
            if count:
                self._images.inc(count, {"kind": kind})

    @contextmanager
    def track(self, request: Request | CompletionRequest) -> Iterator[RequestTracker]:
        """Count the request that the block answers, and log how it ended."""
        progress = RequestTracker(self)
        end = ""
        try:
            yield progress
        except LlavaRayError as error:
            end = error.code
            raise
        except Exception:
            end = "internal_error"
            raise
        finally:
            end = end or progress.tell_end(request.num_answers)
            self._requests.inc(1, {"end": end})
            used = count_usage(progress.latest.values(), answers_each=_answers_each(request))
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
