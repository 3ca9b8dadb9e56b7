"""`llava-ray convert`: raw data becomes shards, on Ray Data."""

from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llava_ray.cli.console import explain_settings, notes, out
from llava_ray.config import ConvertConfig, LimitsConfig
from llava_ray.errors import ConfigError


def _help(name: str) -> str | None:
    return ConvertConfig.model_fields[name].description


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=_help("source"))],
    input: Annotated[str, typer.Option("--input", "-i", help=_help("input"))],
    output: Annotated[str, typer.Option("--output", "-o", help=_help("output"))],
    images: Annotated[str | None, typer.Option(help=_help("images"))] = None,
    split: Annotated[str, typer.Option(help=_help("split"))] = "",
    prompt_format: Annotated[str, typer.Option(help=_help("prompt_format"))] = "",
    model: Annotated[str | None, typer.Option(help=_help("model"))] = None,
    template: Annotated[str | None, typer.Option(help=_help("template"))] = None,
    max_tokens: Annotated[int | None, typer.Option(help=_help("max_tokens"))] = None,
    max_chars: Annotated[int, typer.Option(help=_help("max_chars"))] = 200_000,
    max_image_pixels: Annotated[
        int, typer.Option(help="Images with more pixels are rejected.")
    ] = 40_000_000,
    max_rejects: Annotated[str, typer.Option(help=_help("max_rejects"))] = "1%",
    duplicate_ids: Annotated[
        Literal["reject", "rename"], typer.Option(help=_help("duplicate_ids"))
    ] = "reject",
    rows_per_shard: Annotated[int, typer.Option(help=_help("rows_per_shard"))] = 1000,
    num_workers: Annotated[int | None, typer.Option(help=_help("num_workers"))] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=_help("overwrite"))] = False,
) -> None:
    """Turn raw data into shards that training reads: Parquet, images as they came.

    Rows that cannot be used go to OUTPUT/rejects with the reason. A conversion that was stopped
    goes on when the same command is run again.
    """
    try:
        config = ConvertConfig(
            source=source,
            input=input,
            output=output,
            images=images,
            split=split,
            prompt_format=prompt_format,
            model=model,
            template=template,
            max_tokens=max_tokens,
            max_chars=max_chars,
            max_rejects=max_rejects,
            duplicate_ids=duplicate_ids,
            rows_per_shard=rows_per_shard,
            num_workers=num_workers,
            overwrite=overwrite,
            limits=LimitsConfig(max_image_pixels=max_image_pixels),
        )
    except ValueError as error:
        raise ConfigError(explain_settings(error)) from error

    from llava_ray.data.convert import run as conversion

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        TimeElapsedColumn(),
        console=notes,
    ) as bar:
        task = bar.add_task("starting Ray", total=None)

        def show(progress: conversion.ConvertProgress) -> None:
            said = f"{progress.num_samples:,} samples, {sum(progress.rejects.values()):,} rejected"
            bar.update(task, completed=progress.num_rows, description=said)

        manifest = conversion.convert_dataset(config, on_progress=show)
    out.print(
        f"{output}: {manifest.num_samples:,} samples with {manifest.num_images:,} images in "
        f"{len(manifest.shards)} shards, {manifest.num_text_only:,} of text alone; "
        f"{manifest.num_rejects:,} rows rejected",
        markup=False,
    )
    for reason, num in manifest.rejects.items():
        out.print(f"  {num:>9,}  {reason}", markup=False)
