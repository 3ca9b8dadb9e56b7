"""The shipped training recipes: YAML files for `llava-ray train NAME`, and DeepSpeed JSON files.

A recipe is found by its name, wherever the package is installed. A path is taken as it is.
"""

import difflib
from pathlib import Path
from typing import NamedTuple

from llava_ray.errors import ConfigError

FOLDER = Path(__file__).parent
FORMER_FOLDER = ("jobs", "configs")
"""Where recipes were before they came with the package: paths into it still find them."""


class Recipe(NamedTuple):
    """A shipped file: the name that `train` (YAML) or `deepspeed=` (JSON) takes, and what it is."""

    name: str
    path: Path
    summary: str


def list_recipes() -> list[Recipe]:
    """Return the training recipes, sorted by name; a recipe's summary is its first comment."""
    paths = sorted(FOLDER.glob("*.yaml"))
    return [Recipe(path.stem, path, _read_summary(path)) for path in paths]


def list_deepspeed_files() -> list[str]:
    """Return the names of the DeepSpeed files that `deepspeed=` takes."""
    return sorted(path.name for path in FOLDER.glob("*.json"))


def find_recipe(name: str | Path) -> Path:
    """Return the path of a training recipe, or of a user's own file.

    Args:
        name: a path to a file; the name of a recipe, such as "finetune_lora"; or the path that a
            recipe had in `jobs/configs`.

    Raises:
        ConfigError: there is no such file and no such recipe.
    """
    if found := _find(Path(name), ".yaml"):
        return found
    names = [recipe.name for recipe in list_recipes()]
    close = difflib.get_close_matches(Path(name).name.removesuffix(".yaml"), names, n=1)
    hint = f"did you mean the recipe {close[0]}?" if close else f"recipes are {', '.join(names)}"
    raise ConfigError(f"there is no file and no recipe {str(name)!r}: {hint}")


def find_deepspeed_file(name: str | Path) -> Path:
    """Return the path of a shipped DeepSpeed file, or `name` as it is if none is called so."""
    return _find(Path(name), ".json") or Path(name)


def is_former_path(name: str | Path) -> bool:
    """Whether a path leads to where a recipe was before it came with the package."""
    return not Path(name).exists() and Path(name).parts[-3:-1] == FORMER_FOLDER


def _find(path: Path, suffix: str) -> Path | None:
    if path.is_file():
        return path
    shipped = [each for each in FOLDER.glob(f"*{suffix}") if path.name in (each.name, each.stem)]
    # Of the bare names, those of recipes have no ending: "finetune.yaml" is a file of the user's.
    is_name = len(path.parts) == 1 and (suffix == ".json" or path.suffix != suffix)
    return shipped[0] if shipped and (is_name or is_former_path(path)) else None


def _read_summary(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
