"""The recipe of the embedded model: `python -m jobs.embedded_model train | raw`.

train  the four stages that made the weights in llava_ray/demo/model, on a CPU
raw    raw data, a language model and a vision tower, from which the recipes tiny_pretrain
       and tiny_finetune train a LLaVA
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llava_ray.cli.console import notes, out, print_error
from llava_ray.errors import LlavaRayError, UserError

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def train(
    output_dir: Annotated[Path, typer.Argument(help="Folder to write the weights to.")],
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Approximate training time; by default the recipe's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed, the same scenes.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU cores to use.")] = 2,
    start: Annotated[
        Path | None,
        typer.Option(help="Continue with this model's weights; 'demo' is the embedded model."),
    ] = None,
) -> None:
    """Train the embedded model on the CPU, from scratch or from given weights."""
    from jobs.embedded_model import recipe
    from llava_ray.demo import MODEL_DIR

    recipe.train(
        output_dir,
        budget_minutes=recipe.BUDGET_MINUTES if minutes is None else minutes,
        seed=seed,
        threads=threads,
        start=MODEL_DIR if start == Path("demo") else start,
    )


@app.command()
def raw(
    output_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    scenes: Annotated[int, typer.Option(min=1, help="How many images.")] = 8000,
    seed: Annotated[int, typer.Option(help="The same seed, the same scenes.")] = 0,
) -> None:
    """Write raw data and the parts of a LLaVA, for the recipes tiny_pretrain and tiny_finetune."""
    from jobs.embedded_model.raw import write_raw

    with notes.status(f"drawing {scenes:,} scenes"):
        write_raw(output_dir, num_scenes=scenes, seed=seed)
    out.print(str(output_dir), markup=False)


if __name__ == "__main__":
    try:
        app()
    except LlavaRayError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, UserError) else 1)
