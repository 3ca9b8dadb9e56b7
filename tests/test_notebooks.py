"""The notebooks run from top to bottom on the embedded model, and are kept without outputs."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
"""
"""In a process of its own: Jupyter's event loops and warnings are not this suite's."""


class Run(NamedTuple):
    """A notebook that is being run, and the file into which it speaks."""

    process: "subprocess.Popen[bytes]"
    log: Path


PATIENCE_S = 600


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Run]]:
    """All notebooks side by side: each for the most part waits for its own processes to start."""
    runs = {}
    for path in NOTEBOOKS:
        folder = tmp_path_factory.mktemp(path.stem)
        log = folder / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", RUN, str(path)],
                cwd=folder,
                env={**os.environ, "MPLBACKEND": "agg", "IPYTHONDIR": str(folder)},
                stdout=output,
                stderr=output,
            )
        runs[path] = Run(process, log)
    yield runs
    for run in runs.values():
        run.process.kill()
        run.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(running: dict[Path, Run], path: Path) -> None:
    run = running[path]
    assert run.process.wait(PATIENCE_S) == 0, run.log.read_text()[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    for cell in code:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        compile("".join(cell["source"]), path.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
