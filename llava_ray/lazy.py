"""Names that a package offers without importing their modules until one is used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping

from llava_ray.missing_packages import explain_missing


def make_lazy(
    package: str, sources: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`.

    Args:
        package: its `__name__`.
        sources: the names that it offers, each with the module that defines it.
    """

    def get(name: str) -> object:
        if name not in sources:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(sources[name])
        except ModuleNotFoundError as error:
            raise explain_missing(error) or error from error
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sources})

    return get, list_names
