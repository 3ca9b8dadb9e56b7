"""`llava-ray delta make | apply`: checkpoints without the language model below them."""

from typing import Annotated

import typer

from llava_ray.cli.console import notes, out

app = typer.Typer(help="Checkpoints without the language model below them.")

Base = Annotated[str, typer.Option(help="Folder or hub name of the language model.")]
Tower = Annotated[
    str | None, typer.Option(help="Folder or hub name of the tower, if it is not found.")
]
ShardSize = Annotated[str, typer.Option(help="Of a weight file: 5GB, 500MB.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")
]


@app.command()
def make(
    path: Annotated[str, typer.Argument(help="A whole checkpoint in LLaVA's own layout.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    base: Base,
    vision_tower: Tower = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Subtract the language model from a checkpoint that was trained from it."""
    from llava_ray.model.export.delta import make_delta

    with notes.status(f"subtracting {base}"):
        folder = make_delta(
            path,
            target,
            base=base,
            vision_tower=vision_tower,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    out.print(str(folder), markup=False)


@app.command()
def apply(
    path: Annotated[str, typer.Argument(help="Folder, hub name or address of a delta.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    base: Base,
    vision_tower: Tower = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Add the language model to a delta: a whole checkpoint in LLaVA's own layout."""
    from llava_ray.model.export.export import export_model

    with notes.status(f"adding {base}"):
        folder = export_model(
            path,
            target,
            to="original",
            base=base,
            vision_tower=vision_tower,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    out.print(str(folder), markup=False)
