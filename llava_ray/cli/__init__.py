"""The command line: `llava-ray serve | chat | train | evaluate | ...`, a module for each command.

Everything heavy is imported by the command that needs it, so that `--help` answers at once.
A `UserError` ends a command with its message and exit code 2, any other error of ours with 1.
"""

import os
import sys
from typing import Annotated, Any

import typer
import typer.core
from typer import rich_utils

import llava_ray
from llava_ray.cli import (
    build,
    chat,
    convert,
    data,
    delta,
    demo,
    doctor,
    evaluate,
    export,
    keys,
    lists,
    serve,
    train,
)
from llava_ray.cli.console import out, print_error, show_future_warnings_as_notes
from llava_ray.errors import LlavaRayError, UserError

GROUPS = {
    "Start": ("serve", "chat", "demo"),
    "Data": ("convert", "data"),
    "Train": ("train", "recipes", "templates"),
    "Evaluate": ("evaluate",),
    "Checkpoints": ("build", "doctor", "export", "delta"),
    "Operate": ("keys",),
}
"""The panels of `llava-ray --help`, in a user's order."""

PANELS = {name: panel for panel, names in GROUPS.items() for name in names}
HELP_WIDTH = 120
"""Columns of help that goes to a file or a pipe."""


class _Root(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(PANELS)


app = typer.Typer(
    cls=_Root,
    help="Train, evaluate and serve your own LLaVA, a model that talks about images, on Ray.\n\n"
    "`llava-ray serve` starts a page and an OpenAI-compatible API with a small embedded model; "
    "`llava-ray COMMAND --help` explains a command and lists its settings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command, kind in (
    (serve.serve, serve.ServeCommand),
    (chat.chat, None),
    (convert.convert, convert.ConvertCommand),
    (train.train, train.TrainCommand),
    (lists.recipes, None),
    (lists.templates, None),
    (build.build, None),
    (doctor.doctor, None),
    (export.export, None),
):
    app.command(cls=kind, rich_help_panel=PANELS[command.__name__])(command)
for name, group in (
    ("demo", demo.app),
    ("data", data.app),
    ("delta", delta.app),
    ("keys", keys.app),
):
    app.add_typer(group, name=name, no_args_is_help=True, rich_help_panel=PANELS[name])
app.add_typer(evaluate.app, name="evaluate", rich_help_panel=PANELS["evaluate"])


def main() -> None:
    """The entry point of the `llava-ray` command."""
    if "COLUMNS" not in os.environ and not sys.stdout.isatty():
        rich_utils.MAX_WIDTH = rich_utils.MAX_WIDTH or HELP_WIDTH
    show_future_warnings_as_notes()
    try:
        app()
    except LlavaRayError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"llava-ray {llava_ray.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None: ...
