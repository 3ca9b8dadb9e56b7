"""`llava-ray build`: a new LLaVA from a language model and a vision tower, ready to be trained."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_ray.cli.console import notes, out

Aspect = Literal["square", "pad", "anyres"]
Feature = Literal["patch", "cls_patch"]


def build(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    llm: Annotated[
        str, typer.Option(metavar="PATH", help="Folder or hub name of a causal language model.")
    ],
    vision_tower: Annotated[
        str, typer.Option(metavar="PATH", help="Folder or hub name of a CLIP or SigLIP.")
    ],
    projector: Annotated[str, typer.Option(help="mlp2x_gelu, linear or identity.")] = "mlp2x_gelu",
    aspect: Annotated[
        Aspect,
        typer.Option(
            help="How an image is fitted to the tower's square input: square crops it, pad adds "
            "borders, anyres also splits it into tiles."
        ),
    ] = "square",
    select_layer: Annotated[
        int, typer.Option(help="Which of the tower's hidden states the projector reads.")
    ] = -2,
    select_feature: Annotated[
        Feature, typer.Option(help="patch: without the class token; cls_patch: with it.")
    ] = "patch",
    template: Annotated[
        str | None,
        typer.Option(
            help="Conversation template, such as vicuna_v1; default: the one that fits the model."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of a weight file: 5GB, 500MB.")
    ] = "5GB",
    seed: Annotated[int, typer.Option(help="The same seed gives the same new weights.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")
    ] = False,
) -> None:
    """Build a new LLaVA from a language model and a vision tower, ready to be trained.

    Its projector has random weights: it answers text as its language model does, and does not
    understand images yet.
    """
    from llava_ray.model.build.build import build_llava

    with notes.status(f"building {target}"):
        folder = build_llava(
            target,
            llm=llm,
            vision_tower=vision_tower,
            projector=projector,
            image_aspect=aspect,
            select_layer=select_layer,
            select_feature=select_feature,
            template=template,
            max_shard_size=max_shard_size,
            seed=seed,
            overwrite=overwrite,
        )
    out.print(str(folder), markup=False)
