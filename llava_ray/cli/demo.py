"""`llava-ray demo scene | evaluate`: the embedded model. Its recipe is in jobs/embedded_model."""

import random
from pathlib import Path
from typing import Annotated

import typer

from llava_ray.cli.console import out
from llava_ray.errors import UserError

app = typer.Typer(help="The embedded model: draw its scenes, measure its answers.")


@app.command()
def scene(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="PNG file to write.")],
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same scene.")] = None,
) -> None:
    """Draw a new scene and print questions about it."""
    from llava_ray.demo import make_example

    image, questions = make_example(random.randrange(1 << 31) if seed is None else seed)
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise UserError(
            f"cannot write {str(path)!r} ({error.strerror}): give a new file"
        ) from error
    out.print(*questions, sep="\n", markup=False)


@app.command()
def evaluate(
    model_dir: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="Folder of the weights (default: the embedded ones)."
        ),
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Number of held-out scenes.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed draws the same scenes.")] = 0,
    drawn: Annotated[
        bool, typer.Option(help="Ask about plain shapes that Pillow's own calls draw.")
    ] = False,
    order: Annotated[
        bool, typer.Option(help="Show the scores with the image before, in and after the text.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
) -> None:
    """Print how well the embedded model answers, with the image and without it."""
    from llava_ray.demo import MODEL_DIR

    folder = model_dir or MODEL_DIR
    if not (folder / "config.json").is_file():
        raise UserError(f"no weights in {str(folder)!r}: give the folder that has the config.json")

    from llava_ray.demo import evaluate as scoring

    if order:
        if write is not None:
            raise UserError("--write has no scores to write with --order: leave one of them out")
        scoring.evaluate_orders(folder, num_scenes=scenes, seed=seed, is_drawn=drawn)
        return
    scores = scoring.evaluate(folder, num_scenes=scenes, seed=seed, is_drawn=drawn)
    if write is not None:
        scores.write(write)
