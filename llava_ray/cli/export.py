"""`llava-ray export`: any checkpoint, whole and with everything merged, in the form of another."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llava_ray.cli.console import notes, out

if TYPE_CHECKING:
    from llava_ray.model.export.export import Form
else:
    Form = Literal["hf", "vllm", "original", "projector"]

Precision = Literal["float32", "bfloat16", "float16"]


def export(
    path: Annotated[str, typer.Argument(help="Folder, hub name or address of a checkpoint.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[
        Form | None,
        typer.Option(
            help="hf: transformers, vLLM, SGLang. vllm: the same, if vLLM can run it. original: "
            "LLaVA's own code. projector: mm_projector.bin alone. By default as it is."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model below a projector, an adapter or a delta.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder or hub name of the tower, if it is not found.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Precision; by default that of most weights.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file: 5GB, 500MB.")] = "5GB",
    tower_name: Annotated[
        str | None,
        typer.Option(
            help="Of original and projector: what config.json calls the tower (a hub name), in "
            "place of a folder with it."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")
    ] = False,
) -> None:
    """Write a checkpoint for others to read: LoRA merged, deltas applied, in shards.

    Without --to it is written anew in the layout that it has, under today's names.
    """
    from llava_ray.model.export.export import export_model

    with notes.status(f"exporting {path}"):
        folder = export_model(
            path,
            target,
            to=to,
            base=base,
            vision_tower=vision_tower,
            dtype=dtype,
            max_shard_size=max_shard_size,
            tower_name=tower_name,
            overwrite=overwrite,
        )
    out.print(str(folder), markup=False)
