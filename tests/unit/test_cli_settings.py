"""`[CONFIG.yaml] KEY=VALUE ...`, lists and help: what the command line says without doing work."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_ray.cli import GROUPS, app
from llava_ray.cli.convert import RAW_DATA
from llava_ray.cli.settings import collect_settings, list_settings, read_words
from llava_ray.config import ConvertConfig, EvaluateConfig, ServeConfig, TrainConfig
from llava_ray.data.sources import SOURCES
from llava_ray.errors import ConfigError
from llava_ray.evaluate.tasks import TASKS
from llava_ray.recipes import find_recipe, list_recipes
from llava_ray.template import TEMPLATES

WITH_SETTINGS: dict[str, Any] = {
    "serve": ServeConfig,
    "train": TrainConfig,
    "convert": ConvertConfig,
    "evaluate": EvaluateConfig,
}


def run(*words: str) -> str:
    """Run a command; return what it prints to standard output.

    Raises:
        Exception: what the command raised.
    """
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*words: str) -> tuple[str, str]:
    """Run a command that cannot be done; return its error's message and its notes."""
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError), result.output
    return result.exception.message, result.stderr


def test_words_are_sorted_by_their_form() -> None:
    assert read_words(["demo", "a.yaml", "b=1", "c.d=e=f"]) == (
        "a.yaml",
        "demo",
        ["b=1", "c.d=e=f"],
    )
    assert read_words(["./x=1", "s3://b/k=v/m"][:1]).name == "./x=1"
    assert read_words(None) == (None, None, [])
    with pytest.raises(ConfigError, match="'a' and 'b' are both a name"):
        read_words(["a", "b"])


def test_flags_come_before_words_and_words_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("x: 1\ny: 1\nz: 1\nlimits: {a: 1}\n")
    words = read_words([str(file), "y=2", "z=2", "limits.b=2"])
    settings = collect_settings(words, {"z": 3, "limits.c": 3, "x": None})
    assert settings == {"x": 1, "y": 2, "z": 3, "limits": {"a": 1, "b": 2, "c": 3}}


@pytest.mark.parametrize("command", WITH_SETTINGS)
def test_help_lists_every_setting_with_its_whole_sentence(command: str) -> None:
    shown = run(command, "--help")
    settings = list(list_settings(WITH_SETTINGS[command]))
    assert len(settings) >= len(WITH_SETTINGS[command].model_fields)
    for setting in settings:
        assert re.search(rf"^ {re.escape(setting.name)}  {re.escape(setting.kind)}", shown, re.M)
        assert setting.description
        assert " ".join(setting.description.split()) in shown


def test_settings_are_described_by_kind_and_default() -> None:
    settings = {setting.name: setting for setting in list_settings(TrainConfig)}
    assert settings["method"][1:3] == ("projector|full|lora", "full")
    assert settings["model"][1:3] == ("text", None)
    assert settings["tf32"][1:3] == ("true|false", "true")
    assert settings["data.datasets.0.path"].default is None
    assert settings["report_to"].kind == "list of tensorboard|wandb|mlflow"
    assert settings["benchmarks.steps"].kind == "integer"


def test_the_help_of_the_program_groups_all_commands() -> None:
    shown = run("--help")
    assert "Train, evaluate and serve your own LLaVA" in shown
    for panel, names in GROUPS.items():
        assert f" {panel} " in shown
        for name in names:
            assert re.search(rf"^│ {name} ", shown, re.M), name
    assert {name for names in GROUPS.values() for name in names} >= set(WITH_SETTINGS)


def test_what_can_be_named_is_listed() -> None:
    shown = run("evaluate", "--list-tasks")
    assert all(f" {name} " in shown for name in TASKS)
    shown = run("convert", "--list-sources")
    assert all(f" {name} " in shown for name in SOURCES)
    assert RAW_DATA.keys() == SOURCES.keys()
    shown = run("templates")
    assert all(f" {name} " in shown for name in TEMPLATES)
    assert "USER: <image>\nWhat is this? ASSISTANT: A cat.</s>" in run("templates", "vicuna_v1")
    shown = run("recipes")
    assert all(f" {recipe.name} " in shown for recipe in list_recipes())
    assert run("recipes", "finetune_lora") == find_recipe("finetune_lora").read_text()


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_example_of_each_template_can_be_printed(name: str) -> None:
    assert "A cat." in run("templates", name)


def test_recipes_are_found_by_name_and_by_the_path_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = find_recipe("finetune_1.6")
    assert recipe.is_file()
    assert find_recipe("jobs/configs/finetune_1.6.yaml") == recipe
    assert find_recipe("/elsewhere/jobs/configs/finetune_1.6.yaml") == recipe
    for wrong in ("finetune.yaml", "runs/finetune", "finetun"):
        with pytest.raises(ConfigError, match="did you mean the recipe finetune"):
            find_recipe(wrong)
    Path("finetune.yaml").write_text("name: mine\n")
    assert find_recipe("finetune.yaml") == Path("finetune.yaml")


def test_a_recipes_former_path_is_told_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error, notes = fail("train", "jobs/configs/tiny_pretrain.yaml", "nam=x")
    assert "unknown setting nam: did you mean name" in error
    assert notes == (
        "note: jobs/configs/tiny_pretrain.yaml now comes with the package: "
        "llava-ray train tiny_pretrain\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "model=x"], "name a recipe or a YAML file before model=x"),
        (["train", "finetun"], "did you mean the recipe finetune"),
        (["serve", "demo", "pag=false"], "did you mean page"),
        (["serve", "port=1", "nowhere.yaml"], "cannot read 'nowhere.yaml'"),
        (["serve", "models=[{path: a}]", "engine=echo"], "engine would have no effect"),
        (["convert", "input=a"], "`llava-ray convert --list-sources` lists them"),
        (["convert", "lava", "input=a", "output=b"], "did you mean llava"),
        (["convert", "llava", "output=b"], "input: Field required"),
        (["convert", "llava", "-i", "a", "-o", "b", "--max-tokens", "64"], "set model as well"),
        (["convert", "llava", "--images", "a", "--pictures", "a"], "give --images alone"),
        (["evaluate"], "name at least one task"),
        (["evaluate", "pope"], "'pope' is not a YAML file"),
        (["evaluate", "tasks=pop", "data=a", "output=b"], "did you mean pope"),
        (["evaluate", "tasks=pope"], "--data, results with --output"),
        (["evaluate", "tasks=pope", "data=a", "output=b", "limit=0"], "greater than or equal to 1"),
        (["recipes", "finetun"], "did you mean the recipe finetune"),
        (["templates", "vicuna"], "did you mean 'vicuna_v1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_settings_is_said_with_its_remedy(words: list[str], said: str) -> None:
    assert said in fail(*words)[0]


def test_the_old_flag_pictures_still_works_and_says_what_it_is_called(tmp_path: Path) -> None:
    words = ["llava", "-i", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")]
    error, notes = fail("convert", *words, "--pictures", "x")
    assert "nowhere" in error
    assert notes.startswith("note: --pictures is now called --images\n")
    assert "--pictures" not in run("convert", "--help")


def test_nothing_is_cut_off_in_a_pipe() -> None:
    command = [sys.executable, "-m", "llava_ray.cli", "recipes"]
    # readline sets COLUMNS behind Python's back, where pytest has loaded it.
    env = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    for recipe in list_recipes():
        assert recipe.summary in done.stdout
