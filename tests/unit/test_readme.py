"""What the README promises is there: its commands exist, its tree is the tree, its examples run."""

import re
import shlex
from functools import cache
from pathlib import Path

from typer.testing import CliRunner

from llava_ray.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_commands_are_one_line_each() -> None:
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[dev]' && "
    first, second = code_blocks("bash")[:2]
    assert first == install + "serve run llava_ray.app:deployment\n"
    assert second == install + "pytest -n 2\n"


def test_the_tree_is_the_tree() -> None:
    (tree,) = code_blocks("text")
    named = set()
    for line in tree.splitlines():
        path = line.split()[0]
        if line.startswith(" "):
            path = f"llava_ray/{path}"
        assert (ROOT / path).exists(), f"the README names {path}, which does not exist"
        named.add(path.rstrip("/"))
    package = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("llava_ray/*/*.py")}
    assert package <= named, f"the README's tree lacks {sorted(package - named)}"


def test_every_command_of_ours_knows_the_options_it_is_shown_with() -> None:
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    ours = [words for words in commands if words and words[0] == "llava-ray"]
    assert len(ours) >= 3
    for words in ours:
        subcommand = [word for word in words[1:3] if re.fullmatch(r"[a-z]+", word)]
        while subcommand:
            shown = help_of(tuple(subcommand))
            if shown is not None:
                break
            subcommand.pop()
        assert subcommand, f"no such command: {words}"
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in shown, f"{words[:3]} has no option {word}"


@cache
def help_of(subcommand: tuple[str, ...]) -> str | None:
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    run = runner.invoke(app, [*subcommand, "--help"])
    return run.stdout if run.exit_code == 0 else None


def test_files_that_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), f"the README links to {target}, which does not exist"


def test_the_python_example_is_valid() -> None:
    for block in code_blocks("python"):
        compile(block, "README.md", "exec")
