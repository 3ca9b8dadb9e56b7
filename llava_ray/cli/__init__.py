"""The command line: `llava-ray chat | serve | build | export | ...`, one module a command.

Everything heavy is imported by the command that needs it, so that `--help` is there at once.
A `UserError` ends a command with its message and exit code 2, any other of ours with 1.
"""

import sys
from typing import Annotated

import typer

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
    serve,
    train,
)
from llava_ray.cli.console import out, print_error
from llava_ray.errors import LlavaRayError, UserError
from llava_ray.missing_packages import explain_missing

EXTRAS = {"serve": "serve", "convert": "data", "data": "data", "train": "train", "evaluate": "eval"}
"""The extra with all that a command needs; without a line here, that of the missing package."""

app = typer.Typer(
    help="Talk about images with LLaVA, and serve it on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(build.build)
app.command()(doctor.doctor)
app.command()(convert.convert)
app.command()(export.export)
app.command()(train.train)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(data.app, name="data", no_args_is_help=True)
app.add_typer(delta.app, name="delta", no_args_is_help=True)
app.add_typer(keys.app, name="keys", no_args_is_help=True)
app.add_typer(demo.app, name="demo", no_args_is_help=True)


def main() -> None:
    """The entry point of the `llava-ray` command."""
    try:
        app()
    except LlavaRayError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except ModuleNotFoundError as error:
        explained = explain_missing(error, EXTRAS.get(next(iter(sys.argv[1:]), "")))
        if explained is None:
            raise
        print_error(explained)
        sys.exit(2)


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
