"""What is installed: pins satisfy pyproject.toml, and versions and extras agree everywhere."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llava_ray
from llava_ray.missing_packages import PACKAGES, explain_missing

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def read_pins(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text().splitlines()
    pins = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def list_requirements(*extras: str) -> Iterator[Requirement]:
    """Yield the requirements of the package with some extras, including nested extras."""
    for line in [*PROJECT["dependencies"], *(line for name in extras for line in EXTRAS[name])]:
        requirement = Requirement(line)
        if requirement.name == "llava-ray":
            yield from list_requirements(*requirement.extras)
        else:
            yield requirement


@pytest.mark.parametrize(
    ("path", "extras"),
    [
        ("constraints.txt", ("dev",)),
        ("jobs/configs/requirements.txt", ("serve", "train", "track", "quant")),
    ],
)
def test_every_dependency_is_pinned_to_a_version_that_the_project_accepts(
    path: str, extras: tuple[str, ...]
) -> None:
    pins = read_pins(path)
    for requirement in list_requirements(*extras):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned, f"{path} has no line for {requirement}"
        assert requirement.specifier.contains(pinned), f"{path} pins {pinned} for {requirement}"


def test_hooks_run_the_ruff_that_the_project_pins() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = next(line for line in EXTRAS["dev"] if line.startswith("ruff=="))
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {pinned}


def test_constraints_name_no_path_and_no_local_build() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)


def test_no_requirement_is_written_twice() -> None:
    """Except ray, of which each extra needs another part."""
    seen: dict[str, set[str]] = {}
    for group, lines in [("", PROJECT["dependencies"]), *EXTRAS.items()]:
        for requirement in map(Requirement, lines):
            if requirement.name != "llava-ray":
                seen.setdefault(requirement.name, set()).add(group)
    twice = {name for name, groups in seen.items() if len(groups) > 1}
    assert twice <= {"ray"}


def test_the_base_holds_nothing_heavy() -> None:
    names = {requirement.name for requirement in list_requirements()}
    assert not names & {"ray", "torch", "transformers", "gradio", "numba", "deepspeed", "pyarrow"}


def test_extras_that_messages_name_exist() -> None:
    for path in (ROOT / "llava_ray").rglob("*.py"):
        for extra in re.findall(r"llava-ray\[(\w+)\]", path.read_text()):
            assert extra in EXTRAS, f"{path} names the extra {extra}, which does not exist"


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == llava_ray.__version__
    images = [ROOT / "jobs" / "Dockerfile", *(ROOT / "jobs/configs/kuberay").glob("*.yaml")]
    for path in images:
        for version in re.findall(r"/llava-ray:(\S+)", path.read_text()):
            assert version == llava_ray.__version__, f"{path} names version {version}"


def test_a_missing_package_is_named_with_the_extra_that_installs_it() -> None:
    error = explain_missing(ModuleNotFoundError("No module named 'ray'", name="ray.serve"))
    assert "'ray', which is not installed: pip install 'llava-ray[serve]'" in str(error)
    error = explain_missing(ModuleNotFoundError(name="torch"), "train")
    assert str(error).endswith("pip install 'llava-ray[train]'")
    assert explain_missing(ModuleNotFoundError(name="a_file_of_the_user")) is None


def test_extras_of_missing_packages_hold_them_directly_or_through_another() -> None:
    through = {"huggingface_hub", "jinja2", "llvmlite", "tokenizers", "starlette"}
    for extra, packages in PACKAGES.items():
        names = {requirement.name for requirement in list_requirements(extra)}
        assert set(packages) - through <= names


def test_the_command_line_of_a_plain_install_says_what_to_install(tmp_path: Path) -> None:
    """Without any package that an extra adds, the help and the client still work."""
    hidden = [name for packages in PACKAGES.values() for name in packages]
    hide = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
import llava_ray.client, llava_ray.config
from llava_ray.cli import main
"""

    def run(*words: str) -> tuple[int, str]:
        code = f"{hide}\nsys.argv = ['llava-ray', *{list(words)!r}]\nmain()"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        helped, asked, served, chatted = pool.map(
            lambda words: run(*words),
            [
                ("--help",),
                ("chat", "--url", "http://127.0.0.1:9", "-p", "x"),
                ("serve",),
                ("chat", "--local", "-p", "x"),
            ],
        )
    assert helped[0] == 0
    assert "no server answers" in asked[1]
    assert served[0] == 2
    assert "pip install 'llava-ray[serve]'" in served[1].replace("\n", " ")
    assert chatted[0] == 2
    assert "pip install 'llava-ray[engine]'" in chatted[1].replace("\n", " ")
