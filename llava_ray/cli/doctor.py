"""`llava-ray doctor`: what a checkpoint is, and what is wrong with it."""

from typing import Annotated

import typer

from llava_ray.cli.console import out


def doctor(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Folder, hub name or address of a checkpoint.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The model below a projector, an adapter or a delta.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder or hub name of the vision tower, if it is not found.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Conversation template, if the files do not say which."),
    ] = None,
) -> None:
    """Print what a checkpoint is and what keeps it from loading; exit code 1 if anything does.

    No weights are read.
    """
    from llava_ray.model.doctor import diagnose

    found = diagnose(path, base=base, vision_tower=vision_tower, template=template)
    out.print(found.text(), markup=False)
    if found.problems:
        raise typer.Exit(1)
