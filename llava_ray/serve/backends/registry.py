"""The models that requests can name: this application's own, and those of LLaVA's workers."""

from collections.abc import Mapping

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from llava_ray.config import LimitsConfig
from llava_ray.errors import ModelNotFoundError
from llava_ray.serve import log
from llava_ray.serve.backends.admission_queue import AdmissionQueue
from llava_ray.serve.backends.llava_worker import LlavaWorkerBackend
from llava_ray.serve.backends.replicas import Backend


class ModelRegistry:
    """Finds the model that a request names.

    If both have a name, this application's own model answers, so that a model can be moved here
    from a worker without a break.

    Args:
        backends: this application's own models.
        workers: the deployment of `WorkerRegistry`, if LLaVA's own workers may register.
        limits: bounds the requests in flight to workers, which have queues of their own.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        workers: DeploymentHandle | None,
        limits: LimitsConfig,
    ) -> None:
        self._limits = limits
        self._local = backends
        self._workers = workers
        self._external: dict[str, Backend] = {}

    async def list_names(self) -> list[str]:
        """Return the names of all models, this application's own first."""
        await self._refresh_workers()
        return [*self._local, *self._external]

    async def find(self, name: str) -> Backend:
        """Return the model of that name; raises `ModelNotFoundError`, which lists all names."""
        if name in self._local:
            return self._local[name]
        names = await self.list_names()
        if name in self._external:
            return self._external[name]
        raise ModelNotFoundError(
            f"unknown model {name[:100]!r}: use one of {', '.join(names)}", param="model"
        )

    async def _refresh_workers(self) -> None:
        if self._workers is None:
            return
        names = []
        try:
            names = await self._workers.list_models.remote()
        except (RayError, RayServeException) as error:  # Serve is restarting it
            log.logger.warning(f"cannot list LLaVA's workers: {type(error).__name__}")
        self._external = {
            name: self._external.get(name) or self._build_external(name, self._workers)
            for name in names
            if name not in self._local
        }

    def _build_external(self, name: str, workers: DeploymentHandle) -> Backend:
        queue = AdmissionQueue(
            name,
            num_slots=self._limits.max_in_flight,
            max_waiting=None,
            max_wait_s=self._limits.max_wait_s,
        )
        return LlavaWorkerBackend(name, workers, queue)
