"""Where the command line writes: results to standard output, everything else to standard error."""

import os
import warnings

from rich.console import Console

from llava_ray.errors import LlavaRayError

PIPED_WIDTH = 1000
"""Columns where no terminal limits them, so that tables are not cut off in files and pipes."""


def _make_console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


out = _make_console(stderr=False)
notes = _make_console(stderr=True)


def print_error(error: LlavaRayError) -> None:
    """Say on standard error what went wrong and what to do."""
    notes.print(f"error: {error.message}", markup=False, style="red")


def print_note(text: str) -> None:
    """Say something on standard error that the user should know."""
    notes.print(f"note: {text}", markup=False, style="yellow")


def show_future_warnings_as_notes() -> None:
    """Print the warnings about settings that were renamed without the line that raised them."""
    show = warnings.showwarning

    def show_briefly(message: Warning | str, category: type[Warning], *rest: object) -> None:
        if issubclass(category, FutureWarning) and str(message).startswith("the setting "):
            print_note(str(message))
        else:
            show(message, category, *rest)  # type: ignore[arg-type]  # as they were given

    warnings.showwarning = show_briefly
