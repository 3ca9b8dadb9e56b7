"""What README and docs promise is there: commands, options, links, trees, examples, settings."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from jobs import embedded_model
from jobs.embedded_model.__main__ import app as recipe_of_the_embedded_model
from jobs.write_reference import find_stale, write_pages
from llava_ray.cli import app
from llava_ray.config import ConvertConfig, EvaluateConfig, KeyConfig, ServeConfig, TrainConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WITH_SETTINGS: dict[str, type[BaseModel]] = {
    "serve": ServeConfig,
    "train": TrainConfig,
    "convert": ConvertConfig,
    "evaluate": EvaluateConfig,
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of one language, those inside lists included."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.M)
    return [dedent(block) for block in blocks]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in bash blocks, and of `llava-ray ...` in a sentence.

    `&&` separates commands.
    """
    sentences = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    inline = re.findall(r"`(llava-ray [a-z][^`]*)`", sentences.replace("\n", " "))
    if page.parent.name == "reference":
        inline = []  # usages such as `llava-ray chat [OPTIONS]`
    for block in [*code_blocks(page, "bash"), *inline]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                while command and re.match(r"[A-Z_]+=", command[0]):  # environment variables
                    command = command[1:]
                yield command


def test_the_first_two_commands_are_one_line_each() -> None:
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
    first, second = code_blocks(README, "bash")[:2]
    assert first == install + "'.[serve]' && serve run llava_ray.app:deployment\n"
    assert second == install + "'.[dev]' && pytest -n 2\n"


@every_page
def test_extras_that_are_installed_exist(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for named in re.findall(r"-e '\.\[(.*?)\]'", page.read_text()):
        assert set(named.split(",")) <= extras.keys(), f"{page.name} installs {named}"


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_changelog_tells_the_latest_version_in_at_most_60_lines() -> None:
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert len(sections[1].splitlines()) <= 60


def test_the_tree_is_the_tree() -> None:
    (tree,) = code_blocks(ARCHITECTURE, "text")
    named = set()
    for line in tree.splitlines():
        path = line.split()[0]
        if line.startswith(" "):
            path = f"llava_ray/{path}"
        assert (ROOT / path).exists(), f"the tree names {path}, which does not exist"
        named.add(path.rstrip("/"))
    folders = {
        path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("llava_ray/*/**/*.py")
    }
    assert folders <= named, f"the tree lacks {sorted(folders - named)}"


def test_the_reference_pages_are_those_that_the_code_gives() -> None:
    assert not find_stale(write_pages()), "run python jobs/write_reference.py"


@every_page
def test_every_command_of_ours_knows_the_options_it_is_shown_with(page: Path) -> None:
    for words in commands(page):
        if words[:1] == ["llava-ray"]:
            check_options("llava-ray", app, words[1:])
        elif words[:3] == ["python", "-m", embedded_model.__name__]:
            check_options(embedded_model.__name__, recipe_of_the_embedded_model, words[3:])


def check_options(name: str, program: typer.Typer, words: list[str]) -> None:
    subcommand = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
    shown = help_of(program, ())
    while subcommand:
        found = help_of(program, tuple(subcommand))
        if found is not None:
            shown = found
            break
        subcommand.pop()
    assert shown is not None
    assert subcommand or words[0].startswith("-"), f"no such command: {name} {words}"
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in shown, f"{name} {words[:2]} has no option {word}"


@cache
def help_of(program: typer.Typer, subcommand: tuple[str, ...]) -> str | None:
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    run = runner.invoke(program, [*subcommand, "--help"])
    return run.stdout if run.exit_code == 0 else None


@every_page
def test_settings_on_command_lines_exist(page: Path) -> None:
    for words in commands(page):
        settings = None
        if words[:1] == ["llava-ray"]:
            settings = WITH_SETTINGS.get(words[1])
        if words[:3] == ["serve", "run", "llava_ray.app:build_app"]:
            settings = ServeConfig
        if settings is None:
            continue
        for word in words:
            if assigned := re.match(r"([a-z_0-9.]+)=", word):
                check_setting(settings, assigned[1])


def check_setting(settings: type[BaseModel], name: str) -> None:
    first, _, rest = name.partition(".")
    assert first in settings.model_fields, f"{settings.__name__} has no setting {name}"
    below = settings.model_fields[first].annotation
    if rest and isinstance(below, type) and issubclass(below, BaseModel):
        check_setting(below, rest)


@every_page
def test_recipes_and_files_on_command_lines_exist(page: Path) -> None:
    for words in commands(page):
        if words[:2] in (["llava-ray", "train"], ["llava-ray", "recipes"]) and len(words) > 2:
            assert (ROOT / "llava_ray" / "recipes" / f"{words[2]}.yaml").exists(), words
        for word in words:
            path = word.split("::")[0]
            if re.match(r"(jobs|tests)/", path) or path == "cluster.yaml":
                assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {file.name} has no heading #{anchor}"


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and GitLab make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@every_page
def test_every_page_of_docs_is_in_an_index(page: Path) -> None:
    if page.is_relative_to(ROOT / "docs"):
        indexes = [ROOT / "docs" / "README.md", page.parent / "README.md", README]
        linked = {
            (index.parent / target).resolve()
            for index in indexes
            if index.exists()
            for target in re.findall(r"\]\(([^)#:]+)", index.read_text())
        }
        assert page in linked


@every_page
def test_python_examples_compile_and_import_what_exists(page: Path) -> None:
    for block in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llava_ray"):
                names = public_names(str(node.module))
                for alias in node.names:
                    assert alias.name in names, f"{node.module} has no {alias.name}"


@cache
def public_names(module: str) -> set[str]:
    """Return the names that a module of ours defines or imports, without importing it.

    Texts count too: a lazy package lists its names.
    """
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


@every_page
def test_yaml_examples_are_valid_settings(page: Path) -> None:
    for block in code_blocks(page, "yaml"):
        check_yaml(yaml.safe_load(block))


def check_yaml(settings: Any) -> None:
    if isinstance(settings, list):
        for entry in settings:
            KeyConfig.model_validate(entry)
    elif settings.keys() & ServeConfig.model_fields.keys() - TrainConfig.model_fields.keys():
        ServeConfig.model_validate(settings)
    else:
        TrainConfig.model_validate(settings)
