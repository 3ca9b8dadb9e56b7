"""`llava-ray train`: a run described by a YAML file, on Ray Train."""

from pathlib import Path
from typing import Annotated

import typer

from llava_ray.cli.console import out
from llava_ray.config import TrainConfig


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML, as in jobs/configs.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings in place of the file's."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say what would be done, and what it takes; needs no GPU."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run from its last checkpoint.")
    ] = False,
) -> None:
    """Train a LLaVA with DeepSpeed on Ray, and export it for `serve` and `evaluate`."""
    from llava_ray.train.settings import load_train_config

    settings = load_train_config(config, overrides or [])
    if dry_run:
        from llava_ray.train.dry_run import explain_run

        out.print(explain_run(settings), markup=False)
        if settings.benchmarks:
            out.print(_explain_benchmarks(settings), markup=False)
        return
    from llava_ray.evaluate.during_training import prepare_benchmarks
    from llava_ray.train.launch import launch

    measure = prepare_benchmarks(settings)
    folder = launch(settings, resume=resume, evaluate_checkpoint=measure)
    out.print(f"{folder}/export", markup=False)


def _explain_benchmarks(settings: TrainConfig) -> str:
    from llava_ray.evaluate.during_training import count_questions

    assert settings.benchmarks is not None
    every = settings.benchmarks.steps or settings.save_steps
    counts = (f"{name}: {num:,} questions" for name, num in count_questions(settings).items())
    return "\n".join(["", f"== benchmarks, every {every} steps", *counts])
