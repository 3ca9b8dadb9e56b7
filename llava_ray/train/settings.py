"""The settings of a run, from a recipe or a YAML file, with `key=value` from the command line.

The first step of training.
"""

from collections.abc import Sequence
from pathlib import Path

from llava_ray.config import TrainConfig
from llava_ray.config.files import build_config, override, read_settings
from llava_ray.recipes import find_recipe


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration in a YAML file.

    Args:
        path: of the file, or the name of a recipe (see `llava_ray.recipes`).
        overrides: `key=value`, the value in YAML; `data.max_length=2048` and
            `data.datasets.0.path=...` reach inside.

    Raises:
        ConfigError: there is no such file or recipe, it is not YAML, or it cannot be run.
    """
    settings = read_settings(find_recipe(path))
    override(settings, overrides)
    return build_config(TrainConfig, settings, source=str(path))
