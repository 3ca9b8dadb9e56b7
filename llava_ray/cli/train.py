"""`llava-ray train`: a run described by a recipe or a YAML file, on Ray Train."""

from pathlib import Path
from typing import Annotated

import typer

from llava_ray.cli.console import out, print_note
from llava_ray.cli.settings import make_command_class
from llava_ray.config import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.recipes import is_former_path

TrainCommand = make_command_class(TrainConfig)


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|CONFIG.yaml",
            help="Name of a recipe, as `llava-ray recipes` lists them, or a YAML file.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", show_default=False, help="Settings in place of the recipe's."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say what would be done, and what it takes; needs no GPU."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its newest whole checkpoint.")
    ] = False,
    resume_from: Annotated[
        str | None,
        typer.Option(
            "--resume-from",
            metavar="checkpoint-N",
            help="Continue the run from this checkpoint; later ones are renamed.",
        ),
    ] = None,
) -> None:
    """Train a LLaVA with DeepSpeed on Ray, and export it for `serve` and `evaluate`.

    llava-ray train finetune_lora model=my-llava data.datasets.0.path=shards/mine
    """
    from llava_ray.train.settings import load_train_config

    if "=" in config and not Path(config).exists():
        raise ConfigError(
            f"name a recipe or a YAML file before {config}: llava-ray train finetune_lora "
            f"{config}; `llava-ray recipes` lists the recipes"
        )
    if is_former_path(config):
        name = Path(config).stem if config.endswith(".yaml") else Path(config).name
        print_note(f"{config} now comes with the package: llava-ray train {name}")
    settings = load_train_config(config, overrides or [])
    if dry_run:
        from llava_ray.train.dry_run import explain_run

        out.print(explain_run(settings), markup=False)
        if settings.benchmarks:
            out.print(_explain_benchmarks(settings), markup=False)
        return
    from llava_ray.train import train_model

    folder = train_model(settings, resume=resume_from or resume)
    out.print(f"{folder}/export", markup=False)


def _explain_benchmarks(settings: TrainConfig) -> str:
    from llava_ray.evaluate.during_training import count_questions

    assert settings.benchmarks is not None
    every = settings.benchmarks.steps or settings.save_steps
    counts = (f"{name}: {num:,} questions" for name, num in count_questions(settings).items())
    return "\n".join(["", f"== benchmarks, every {every} steps", *counts])
