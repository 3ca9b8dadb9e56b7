"""`llava-ray delta make | apply`: a checkpoint as its difference from a language model."""

from typing import Annotated

import typer

from llava_ray.cli.console import notes, out

app = typer.Typer(help="Checkpoints as differences from their language model.")

Base = Annotated[str, typer.Option(help="Folder or hub name of the language model.")]
Tower = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Folder or hub name of the vision tower, if it is not found."
    ),
]
ShardSize = Annotated[str, typer.Option(help="Largest size of a weight file: 5GB, 500MB.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")
]


@app.command()
def make(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A complete checkpoint in LLaVA's own format.")
    ],
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
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Folder, hub name or address of a delta.")
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    base: Base,
    vision_tower: Tower = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Add the language model to a delta: a complete checkpoint in LLaVA's own format."""
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
