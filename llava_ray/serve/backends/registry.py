"""The models that can be asked here, by name: this application's own, then those of workers."""

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

    A name that both have is this application's: a model moves over by being served here too.

    Args:
        backends: this application's own models.
        workers: the deployment of `WorkerRegistry`, if LLaVA's own workers may register.
        limits: how many requests a gateway has at once; such workers have queues of their own.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        workers: DeploymentHandle | None,
        limits: LimitsConfig,
    ) -> None:
        self._limits = limits
        self._own = backends
        self._workers = workers
        self._foreign: dict[str, Backend] = {}

    async def list_names(self) -> list[str]:
        """Return the names of all models, this application's own first."""
        await self._look_for_workers()
        return [*self._own, *self._foreign]

    async def find(self, name: str) -> Backend:
        """Return the model of that name; raises `ModelNotFoundError` with those that there are."""
        if name in self._own:
            return self._own[name]
        names = await self.list_names()
        if name in self._foreign:
            return self._foreign[name]
        raise ModelNotFoundError(
            f"there is no model {name[:100]!r} here; there is {', '.join(names)}", param="model"
        )

    async def _look_for_workers(self) -> None:
        if self._workers is None:
            return
        names = []
        try:
            names = await self._workers.list_models.remote()
        except (RayError, RayServeException) as error:  # Serve is starting it anew
            log.logger.warning(f"the workers cannot be listed: {type(error).__name__}")
        self._foreign = {
            name: self._foreign.get(name) or self._build_foreign(name, self._workers)
            for name in names
            if name not in self._own
        }

    def _build_foreign(self, name: str, workers: DeploymentHandle) -> Backend:
        queue = AdmissionQueue(
            name,
            num_slots=self._limits.max_in_flight,
            max_waiting=None,
            max_wait_s=self._limits.max_wait_s,
        )
        return LlavaWorkerBackend(name, workers, queue)
