"""`llava-ray convert`: raw data becomes shards, on Ray Data."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from llava_ray.cli.console import notes, out, print_note
from llava_ray.cli.settings import collect_settings, make_command_class, read_words
from llava_ray.config import ConvertConfig
from llava_ray.config.files import build_config
from llava_ray.errors import ConfigError

if TYPE_CHECKING:
    from llava_ray.data.manifest import Manifest

RAW_DATA = {
    "llava": "LLaVA's JSON or JSON lines: id, image, conversations of human and gpt",
    "sharegpt": "ShareGPT's and Alpaca's JSON or JSON lines, with or without images",
    "openai": "OpenAI's JSON or JSON lines: messages with text and image_url parts",
    "pairs": "a folder of images, each with its text in a file beside it: cat.jpg, cat.txt",
    "scienceqa": "ScienceQA: problems.json, pid_splits.json and its images",
    "coco": "COCO: captions_*.json, instances_*.json and its images",
    "vqa": "VQAv2, OK-VQA, A-OKVQA or VizWiz: files of questions, annotations and images",
    "gqa": "GQA: train_balanced_questions.json and its images",
    "textvqa": "TextVQA: questions about the text in an image",
    "textcaps": "TextCaps: captions of images with text in them",
    "ocrvqa": "OCR-VQA: dataset.json and its images of book covers",
    "refcoco": "RefCOCO, RefCOCO+ or RefCOCOg: refs(*).p, instances.json and COCO's images",
    "vg": "Visual Genome: region_descriptions.json, image_data.json and its images",
    "hf": "a Hugging Face dataset: Parquet or Arrow files that contain images",
    "webdataset": "WebDataset: tar files in which an image and a .txt or .json share a name",
}
"""What each source reads, for `--list-sources`."""

ConvertCommand = make_command_class(ConvertConfig)


def _help(name: str) -> str | None:
    return ConvertConfig.model_fields[name].description


def convert(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE|CONFIG.yaml|KEY=VALUE",
            show_default=False,
            help="Kind of raw data, as --list-sources names them, or a YAML file of settings; then "
            "settings.",
        ),
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", "-i", metavar="PATH", help=_help("input"))
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FOLDER", help=_help("output"))
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="FOLDER", help=_help("images"))] = None,
    pictures: Annotated[str | None, typer.Option(hidden=True)] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help=_help("split"))] = None,
    prompt_format: Annotated[
        str | None, typer.Option(metavar="NAME", help=_help("prompt_format"))
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="PATH", help=_help("model"))] = None,
    template: Annotated[str | None, typer.Option(metavar="NAME", help=_help("template"))] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help=_help("max_tokens"))] = None,
    max_chars: Annotated[int | None, typer.Option(metavar="N", help=_help("max_chars"))] = None,
    max_image_pixels: Annotated[
        int | None, typer.Option(metavar="N", help="Images with more pixels are rejected.")
    ] = None,
    max_rejects: Annotated[
        str | None, typer.Option(metavar="N|N%", help=_help("max_rejects"))
    ] = None,
    duplicate_ids: Annotated[
        Literal["reject", "rename"] | None, typer.Option(help=_help("duplicate_ids"))
    ] = None,
    rows_per_shard: Annotated[
        int | None, typer.Option(metavar="N", help=_help("rows_per_shard"))
    ] = None,
    num_workers: Annotated[int | None, typer.Option(metavar="N", help=_help("num_workers"))] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help=_help("overwrite"))] = None,
    list_sources: Annotated[
        bool, typer.Option("--list-sources", help="List the kinds of raw data, and exit.")
    ] = False,
) -> None:
    """Convert raw data to the shards that training reads: Parquet files, with images unchanged.

    Rows that cannot be used go to OUTPUT/rejects with the reason. Run the same command again to
    resume after an interruption, or after the raw data has changed.
    """
    if list_sources:
        _print_sources()
        return
    if pictures is not None:
        print_note("--pictures is now called --images")
        if images is not None:
            raise ConfigError("--pictures is the old name of --images: give --images alone")
        images = pictures
    given = read_words(words)
    flags = {
        "source": given.name,
        "input": input,
        "output": output,
        "images": images,
        "split": split,
        "prompt_format": prompt_format,
        "model": model,
        "template": template,
        "max_tokens": max_tokens,
        "max_chars": max_chars,
        "limits.max_image_pixels": max_image_pixels,
        "max_rejects": max_rejects,
        "duplicate_ids": duplicate_ids,
        "rows_per_shard": rows_per_shard,
        "num_workers": num_workers,
        "overwrite": overwrite,
    }
    settings = collect_settings(given, flags)
    if "source" not in settings:
        raise ConfigError(
            "name the kind of raw data: `llava-ray convert --list-sources` lists them"
        )
    if isinstance(settings.get("max_rejects"), int):  # as YAML reads it
        settings["max_rejects"] = str(settings["max_rejects"])
    config = build_config(ConvertConfig, settings, source=given.file or "")
    try:
        manifest = _convert(config)
    except KeyboardInterrupt:
        print_note("stopped; run the same command again to resume")
        raise
    out.print(
        f"{config.output}: {manifest.num_samples:,} samples with {manifest.num_images:,} images in "
        f"{len(manifest.shards)} shards, {manifest.num_text_only:,} of text alone; "
        f"{manifest.num_rejects:,} rows rejected",
        markup=False,
    )
    for reason, num in manifest.rejects.items():
        out.print(f"  {num:>9,}  {reason}", markup=False)


def _convert(config: ConvertConfig) -> "Manifest":
    """Convert with a progress bar."""
    from llava_ray.data.convert import run
    from llava_ray.data.sources import find_source

    find_source(config.source)  # a wrong name is told before Ray starts

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        TimeElapsedColumn(),
        console=notes,
    ) as bar:
        task = bar.add_task("starting Ray", total=None)

        def show(progress: run.ConvertProgress) -> None:
            said = f"{progress.num_samples:,} samples, {sum(progress.rejects.values()):,} rejected"
            bar.update(task, completed=progress.num_rows, description=said)

        return run.convert_dataset(config, on_progress=show)


def _print_sources() -> None:
    from llava_ray.data.sources import SOURCES

    table = Table("source", "raw data")
    for name in SOURCES:
        table.add_row(name, RAW_DATA[name])
    out.print(table)
