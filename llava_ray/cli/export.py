"""`llava-ray export`: any checkpoint as a complete one, in the format that others read."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llava_ray.cli.console import notes, out

if TYPE_CHECKING:
    from llava_ray.model.export.export import ExportFormat
else:
    ExportFormat = Literal["hf", "vllm", "original", "projector"]

Precision = Literal["float32", "bfloat16", "float16"]


def export(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Folder, hub name or address of a checkpoint.")
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[
        ExportFormat | None,
        typer.Option(
            help="hf: transformers, vLLM, SGLang. vllm: the same, checked to run in vLLM. "
            "original: LLaVA's own code. projector: mm_projector.bin alone. Default: the format "
            "that it has."
        ),
    ] = None,
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
    dtype: Annotated[
        Precision | None, typer.Option(help="Precision; default: that of most weights.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of a weight file: 5GB, 500MB.")
    ] = "5GB",
    tower_name: Annotated[
        str | None,
        typer.Option(
            help="For original and projector: the hub name of the vision tower that config.json "
            "gives, in place of a folder with its weights."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")
    ] = False,
) -> None:
    """Write a complete checkpoint for other programs: LoRA merged, deltas applied, in shards.

    Without --to it is rewritten in the format that it has, with the current tensor names.
    """
    from llava_ray.model.export.export import export_model

    with notes.status(f"exporting {path}"):
        folder = export_model(
            path,
            target,
            to=to,
            base=base,
            vision_tower=vision_tower,
            template=template,
            dtype=dtype,
            max_shard_size=max_shard_size,
            tower_name=tower_name,
            overwrite=overwrite,
        )
    out.print(str(folder), markup=False)
