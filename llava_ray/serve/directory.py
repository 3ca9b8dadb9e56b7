"""The models that can be asked here, by name."""

from collections.abc import Mapping

from llava_ray.errors import ModelNotFoundError
from llava_ray.serve.backend import Backend


class Directory:
    """Finds the model that a request names.

    Args:
        backends: this application's own models.
    """

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends

    def names(self) -> list[str]:
        return list(self._backends)

    def find(self, name: str) -> Backend:
        """Return the model of that name; raises `ModelNotFoundError` with those that there are."""
        if name not in self._backends:
            raise ModelNotFoundError(
                f"there is no model {name[:100]!r} here; there is {', '.join(self._backends)}",
                param="model",
            )
        return self._backends[name]
