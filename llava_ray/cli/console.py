"""Where the command line writes: answers to standard output, everything else beside it."""

from rich.console import Console

from llava_ray.errors import LlavaRayError

out = Console(highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


def print_error(error: LlavaRayError) -> None:
    """Say on standard error what went wrong and what to do."""
    notes.print(f"error: {error.message}", markup=False, style="red")


def explain_settings(error: ValueError) -> str:
    """Return what is wrong with settings: one line a problem, with the field in front."""
    problems = getattr(error, "errors", list)()
    lines = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}".lstrip(": ") for p in problems]
    return "; ".join(lines) or str(error)
