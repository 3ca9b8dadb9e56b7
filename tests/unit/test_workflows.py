"""What .github/workflows, .ci/run and the hooks name exists: stages, files, markers, settings."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CI = ROOT / ".ci" / "run"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
STAGES = set(re.findall(r"^(\w+)\(\) \{", CI.read_text(), re.M))
MARKERS = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
PROGRAMS = {"python3", "pip", "pytest", "sudo", "apt-get", ".venv/bin/pip", ".ci/run"}
"""What a step may call: a runner has the first, an earlier step installs the others."""

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def read_jobs(path: Path) -> dict[str, Any]:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"]
    assert workflow[True], "the key `on` (YAML reads it as true)"
    return workflow["jobs"]


def read_commands(path: Path) -> list[list[str]]:
    """The words of each command of each step, without the environment variables before it."""
    steps = [step for job in read_jobs(path).values() for step in job["steps"]]
    commands = [part for step in steps if "run" in step for part in step["run"].split("&&")]
    return [
        [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        for command in commands
    ]


@every_workflow
def test_every_job_has_a_limit_and_steps_that_run_or_use_something(path: Path) -> None:
    for name, job in read_jobs(path).items():
        assert job["runs-on"], name
        assert job["timeout-minutes"] <= 120, name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name


@every_workflow
def test_every_command_of_a_workflow_exists(path: Path) -> None:
    for program, *words in read_commands(path):
        assert program in PROGRAMS, f"{path.name} calls {program}"
        if program == ".ci/run":
            assert set(words) <= STAGES
        if program == "pytest":
            paths = [word for word in words if word.startswith("tests")]
            assert all((ROOT / each).exists() for each in paths)
            assert words[:1] != ["-m"] or words[1] in MARKERS


@every_workflow
def test_python_versions_are_those_that_the_package_names(path: Path) -> None:
    classifiers = PROJECT["project"]["classifiers"]
    for version in re.findall(r"\b3\.\d+\b", path.read_text()):
        assert f"Programming Language :: Python :: {version}" in classifiers


def test_ci_run_names_its_stages_and_every_file_in_it_exists() -> None:
    text = CI.read_text()
    default = set(text.split("${@:-")[1].split("}")[0].split())
    assert default <= STAGES
    for path in re.findall(r"(?:tests|\.ci)/[\w/]+\.(?:py|sh)", text):
        assert (ROOT / path).is_file(), path
    for script in [CI, *(ROOT / ".ci").rglob("*.sh")]:
        subprocess.run(["bash", "-n", script], check=True)
