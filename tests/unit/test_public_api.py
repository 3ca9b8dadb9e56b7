"""What the package exports: users import these names, so each change to them is made on purpose."""

import importlib
import subprocess
import sys

import pytest

EXPORTED = {
    "llava_ray": [
        "Client",
        "ConvertConfig",
        "EvaluateConfig",
        "LLaVA",
        "LlavaRayError",
        "ModelConfig",
        "ServeConfig",
        "TrainConfig",
        "__version__",
        "load_model",
    ],
    "llava_ray.data": ["convert_dataset", "stream_batches"],
    "llava_ray.train": ["train_model"],
    "llava_ray.evaluate": ["compare_runs", "evaluate_model"],
    "llava_ray.serve": ["build_app", "serve_models"],
    "llava_ray.engine": ["load_engine"],
    "llava_ray.model": ["LoadedModel", "load_model"],
}


@pytest.mark.parametrize("package", EXPORTED)
def test_a_package_exports_these_names_and_each_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == EXPORTED[package]
    assert set(EXPORTED[package]) <= set(dir(module))
    for name in EXPORTED[package]:
        value = getattr(module, name)
        assert name == "__version__" or value.__name__ == name


def test_a_name_that_is_not_exported_is_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'llava_ray' has no attribute 'Lava'"):
        getattr(importlib.import_module("llava_ray"), "Lava")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name 'Lava'"):
        exec("from llava_ray import Lava")


@pytest.mark.parametrize("package", EXPORTED)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    """Nor pydantic: what a name needs is loaded when the name is used."""
    code = f"import sys, {package}; print(*sorted(sys.modules))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "ray", "gradio", "transformers", "PIL", "pydantic", "numpy", "httpx"}
    assert not heavy & set(loaded)
    ours = {name for name in loaded if name.startswith("llava_ray")}
    assert ours <= {
        "llava_ray",
        package,
        "llava_ray.lazy",
        "llava_ray.missing_packages",
        "llava_ray.errors",
    }
