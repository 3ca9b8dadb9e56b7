"""`llava-ray data inspect`: what a set of shards contains."""

from pathlib import Path
from typing import Annotated

import typer

from llava_ray.cli.console import notes, out
from llava_ray.errors import ConfigError

app = typer.Typer(help="Inspect data for training.")


@app.callback()
def _group() -> None: ...


@app.command("inspect")
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder or address of shards.")],
    page: Annotated[
        Path | None, typer.Option(help="Write an HTML file with some samples to look at.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, max=1000, help="Samples on the page.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the samples on the page.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint; the page then marks the tokens that have a loss."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Conversation template, in place of the checkpoint's own.")
    ] = None,
) -> None:
    """Print what a set of shards contains: counts, lengths, sizes, and what was rejected.

    With --page some samples are written to an HTML file, with their images and, with --model,
    their loss mask.
    """
    from llava_ray.data.inspect import describe, draw_samples, summarize

    for line in describe(summarize(path)):
        out.print(line, markup=False)
    if page is None:
        return
    from llava_ray.data.inspect_html import write_page
    from llava_ray.data.loader.encode import load_encoder

    encoder = load_encoder(model, template=template) if model else None
    rows = draw_samples(path, num_samples=num_samples, seed=seed)
    try:
        page.write_text(write_page(rows, title=path, encoder=encoder), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(page)!r} ({error.strerror}): give another file"
        ) from error
    notes.print(f"{len(rows)} samples: {page}", markup=False)
