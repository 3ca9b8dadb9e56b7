"""The registry of LLaVA's own workers, which takes the place of LLaVA's controller.

One replica of `WorkerRegistry` holds the table for all gateways. `check_address` decides who may
register. A worker whose heartbeats stop is removed. A worker that is unknown, because this process
was restarted, is told so in the answer to its next heartbeat and registers again.
"""

import asyncio
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from llava_ray.config import WORKER_ADDRESS, LlavaProtocolConfig
from llava_ray.errors import NotAllowedError, RequestError
from llava_ray.serve import log
from llava_ray.serve.llava.protocol import StatusBody, parse

MAX_WORKERS = 256
STATUS_TIMEOUT_S = 5.0
_STATUS_BYTES = 64 << 10


@dataclass(slots=True)
class RegisteredWorker:
    """A worker, as it last described itself.

    Attributes:
        is_watched: whether it sends heartbeats, and is removed when they stop.
        heard_at: when it last made contact, in seconds of a monotonic clock.
    """

    status: StatusBody
    is_watched: bool
    heard_at: float


class WorkerRegistry:
    """The table of workers, by address.

    Args:
        config: how long a silent worker is kept, and how one of several is chosen.
        clock: returns seconds; replaced in tests.
    """

    def __init__(
        self, config: LlavaProtocolConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._workers: dict[str, RegisteredWorker] = {}
        self._http = httpx.AsyncClient(timeout=STATUS_TIMEOUT_S, trust_env=False)

    async def register(self, address: str, is_watched: bool, status: StatusBody | None) -> str:
        """Add a worker, asking for its status if it sent none; return an error message or ""."""
        self._forget_silent()
        if len(self._workers) >= MAX_WORKERS and address not in self._workers:
            return f"there are already {MAX_WORKERS} workers, the maximum: stop one first"
        if status is None:
            try:
                status = await self._ask(address)
            except (httpx.HTTPError, httpx.InvalidURL, RequestError) as error:
                return f"the worker at {address} did not report its status: {error!r}"
        self._workers[address] = RegisteredWorker(status, is_watched, self._clock())
        log.logger.info(f"LLaVA's worker at {address} serves {', '.join(status.model_names)}")
        return ""

    async def note_heart_beat(self, address: str, queue_length: int) -> bool:
        """Record a heartbeat; return whether the worker is known. If not, it registers again."""
        self._forget_silent()
        if worker := self._workers.get(address):
            worker.heard_at = self._clock()
            worker.status.queue_length = queue_length
        return worker is not None

    async def refresh(self) -> None:
        """Ask all workers for their status, and remove those that do not respond."""
        self._forget_silent()
        addresses = list(self._workers)
        replies = await asyncio.gather(*map(self._ask, addresses), return_exceptions=True)
        for address, reply in zip(addresses, replies, strict=True):
            if isinstance(reply, BaseException):
                await self.forget(address, repr(reply))
            elif worker := self._workers.get(address):
                worker.status, worker.heard_at = reply, self._clock()

    async def list_models(self) -> list[str]:
        """Return the names of all workers' models, sorted."""
        self._forget_silent()
        return sorted(
            {name for worker in self._workers.values() for name in worker.status.model_names}
        )

    async def choose(self, model: str) -> str:
        """Return the address of the worker to use next; "" if none has the model."""
        self._forget_silent()
        able = {
            address: worker.status
            for address, worker in self._workers.items()
            if model in worker.status.model_names
        }
        if not able:
            return ""
        if self._config.dispatch_method == "lottery":
            speeds = [status.speed for status in able.values()]
            return random.choices(list(able), speeds)[0]
        chosen = min(able, key=lambda address: able[address].queue_length / able[address].speed)
        able[chosen].queue_length += 1  # until its next heartbeat reports the true length
        return chosen

    async def forget(self, address: str, reason: str) -> None:
        if self._workers.pop(address, None):
            log.logger.warning(f"LLaVA's worker at {address} was removed: {reason[:200]}")

    async def _ask(self, address: str) -> StatusBody:
        async with self._http.stream("POST", f"{address}/worker_get_status") as reply:
            reply.raise_for_status()
            body = b""
            async for piece in reply.aiter_bytes():
                body += piece
                if len(body) > _STATUS_BYTES:
                    raise RequestError(f"it sent a status of more than {_STATUS_BYTES:,} bytes")
        return parse(StatusBody, body)

    def _forget_silent(self) -> None:
        oldest = self._clock() - self._config.worker_timeout_s
        for address, worker in list(self._workers.items()):
            if worker.is_watched and worker.heard_at < oldest:
                del self._workers[address]
                log.logger.warning(f"LLaVA's worker at {address} was removed: no heartbeat")


def check_address(address: str, allowed: Sequence[str]) -> str:
    """Return a worker's address, without a slash at its end.

    Raises:
        NotAllowedError: it is not among `allowed`, in which a port may be `*`.
    """
    address = address.rstrip("/")
    if not re.fullmatch(WORKER_ADDRESS, address) or "*" in address:
        raise NotAllowedError(
            f"worker_name={address[:100]!r} is not a worker's address: register as http://host:port",
            param="worker_name",
        )
    either = (address, _star_port(address))
    if not any(pattern.rstrip("/") in either for pattern in allowed):
        raise NotAllowedError(
            f"the worker {address[:100]} may not register here: the operator of this gateway must "
            "add it to llava_protocol.workers",
            param="worker_name",
        )
    return address


def _star_port(address: str) -> str:
    return re.sub(r"(://[^/]*?)(:[0-9]+)?(/|$)", r"\1:*\3", address, count=1)
