"""Who may import what (docs/architecture.md, "Floors"): imports only go down."""

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "llava_ray"

FLOORS = [
    {"cli"},
    {"app", "llava"},
    {"evaluate", "llava_input", "serve"},
    {"client", "train", "engine", "demo"},
    {"data"},
    {"model"},
    {"template", "images", "storage"},
    {"config", "recipes", "lazy"},
    {"missing_packages"},
    {"types", "errors", "priority", "cluster"},
]

FACES = {
    "serve/__init__.py": "llava_ray.app",
    "train/__init__.py": "llava_ray.evaluate.during_training",
}
"""Public faces that name, without importing it, what is built on top of their package."""

MAY_IMPORT = {
    "ray": (
        "app.py",
        "cluster.py",
        "cli/",
        "serve/gateway/",
        "serve/backends/",
        "serve/replica/",
        "serve/page/app.py",
        "data/convert/run.py",
        "data/start_ray.py",
        "data/loader/stream.py",
        "train/launch.py",
        "train/stop.py",
        "train/trackers.py",
        "train/worker.py",
        "evaluate/predict/",
        "evaluate/run.py",
    ),
    "torch": (
        "model/",
        "engine/input_processor.py",
        "engine/torch_engine/engine.py",
        "engine/torch_engine/execution/",
        "engine/external/settings.py",
        "demo/",
        "data/loader/collate.py",
        "train/",
    ),
    "llguidance": ("engine/schema_check.py", "engine/structured_output.py"),
    "pycocoevalcap": ("evaluate/scoring/captions.py",),
    "openpyxl": ("evaluate/submission.py",),
    "gradio": ("serve/page/",),
    "vllm": ("engine/external/worker/vllm_worker.py",),
    "sglang": ("engine/external/worker/sglang_worker.py",),
    "deepspeed": ("train/",),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere; `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    file = path.relative_to(PACKAGE)
    part = file.parts[0].removesuffix(".py")
    for name in imports(path):
        if not name.startswith("llava_ray.") or part == "__init__":
            continue
        if name.rpartition(".")[0] == FACES.get(file.as_posix()):
            continue
        other = name.split(".")[1]
        if other in ("__version__", part):
            continue
        assert floor(other) > floor(part), f"{part} imports {name}, which is not below it"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_heavy_package_is_known_to_few_files(package: str) -> None:
    for path in modules():
        file = path.relative_to(PACKAGE).as_posix()
        uses = any(name == package or name.startswith(package + ".") for name in imports(path))
        assert not uses or file.startswith(MAY_IMPORT[package]), f"{file} imports {package}"


ABSENT = {
    "llava_ray": {"torch", "ray", "gradio", "transformers", "PIL"},
    "llava_ray.cli": {"torch", "ray", "gradio", "transformers"},
    "llava_ray.app": {"torch", "gradio", "vllm", "sglang", "deepspeed"},
    "llava_ray.serve.page": {"torch", "gradio"},
    "llava_ray.serve.openai.openapi": {"torch", "ray", "gradio"},
    "llava_ray.serve.openai.chat": {"torch", "ray", "gradio"},
    "llava_ray.serve.openai.completions": {"torch", "ray", "gradio"},
    "llava_ray.serve.openai.streaming": {"torch", "ray", "gradio"},
    "llava_ray.serve.llava.protocol": {"torch", "ray", "gradio"},
    "llava_ray.serve.llava.worker_request": {"torch", "ray", "gradio"},
    "llava_ray.serve.llava.worker_registry": {"torch", "ray", "gradio"},
    "llava_ray.serve.fetch.client": {"torch", "ray", "gradio"},
    "llava_ray.serve.request_context": {"torch", "ray", "gradio"},
    "llava_ray.engine.protocol": {"torch", "ray", "gradio"},
    "llava_ray.engine.torch_engine.scheduling.scheduler": {"torch", "ray", "numba"},
    "llava_ray.demo": {"torch", "ray", "gradio"},
    "llava_ray.data.sources": {"torch", "ray", "transformers"},
    "llava_ray.data.loader.order": {"torch", "ray", "transformers", "pyarrow"},
    "llava_ray.evaluate.tasks": {"torch", "ray", "transformers", "pycocoevalcap", "openpyxl"},
    "llava_ray.data.convert.run": {"torch", "transformers"},
}
"""What importing a part does not load."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """For each part, the packages that should be absent but are loaded by importing it."""

    def find_loaded(module: str) -> list[str]:
        code = f"import sys, {module}; print(*sorted({ABSENT[module]!r} & set(sys.modules)))"
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.split() if done.returncode == 0 else [done.stderr]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(ABSENT, pool.map(find_loaded, ABSENT), strict=True))


@pytest.mark.parametrize("module", ABSENT)
def test_importing_a_part_loads_no_more_than_it_needs(
    loaded: dict[str, list[str]], module: str
) -> None:
    assert loaded[module] == []


def test_no_name_says_nothing() -> None:
    names = {path.stem for path in modules()} | {path.parent.name for path in modules()}
    assert not names & {"utils", "util", "common", "helpers", "misc", "manager"}


def test_every_package_folder_has_an_init_file_that_git_does_not_ignore() -> None:
    folders = {path.parent for path in modules()}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
    patterns = (PACKAGE.parent / ".gitignore").read_text().split()
    names = {name for folder in folders for name in folder.relative_to(PACKAGE.parent).parts}
    assert not {f"{name}/" for name in names} & set(patterns)


def test_no_two_public_classes_share_a_name() -> None:
    files: dict[str, list[str]] = {}
    for path in [*modules(), *sorted(PACKAGE.with_name("jobs").rglob("*.py"))]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(str(path.relative_to(PACKAGE.parent)))
    assert not {name: where for name, where in files.items() if len(where) > 1}
