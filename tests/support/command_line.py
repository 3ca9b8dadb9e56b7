"""Run a `llava-ray` command inside the test process."""

import sys
from pathlib import Path

import pytest

from llava_ray import cli


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Run a command as a terminal does, in this process; return its exit code and its output."""
    before = sys.argv
    sys.argv = ["llava-ray", *map(str, words)]
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = before
    told = capsys.readouterr()
    return code, told.out, told.err
