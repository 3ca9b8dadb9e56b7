"""Benchmarks: `python jobs/benchmark.py serve` prints the figures of docs/benchmarks.md.

Each command measures this project and what it is compared with in one run on one machine, and
prints a table and one line of JSON.
"""

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from benchmark_data import benchmark_data
from benchmark_evaluate import benchmark_evaluate
from benchmark_run import print_table
from benchmark_serve import benchmark_serve
from benchmark_train import benchmark_train

cli = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@dataclass(frozen=True)
class LoadFigures:
    """One row of the table of loading: medians over several runs, each in its own process."""

    system: str
    weights_mb: float
    load_s: float  # model, tokenizer and image processor; imports are not included
    peak_mb: float  # growth of the process while loading
    peak_to_weights: float


@cli.callback()
def commands() -> None:
    """Measure speed."""


LOADERS = {
    "llava_ray": """
from llava_ray.model.loading import load_model
def load(path, dtype):
    return load_model(path, dtype=dtype, device="cpu")
""",
    "transformers": """
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration
def load(path, dtype):
    AutoTokenizer.from_pretrained(path)
    AutoImageProcessor.from_pretrained(path, backend="pil")
    return LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, device_map={"": "cpu"})
""",
}
MEASURE_LOAD = """
import sys, time
def read_kb(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
path, tiny, dtype = sys.argv[1:]
load(tiny, dtype)
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before, start = read_kb("VmRSS"), time.perf_counter()
model = load(path, dtype)
seconds = time.perf_counter() - start
print(seconds, (read_kb("VmHWM") - before) * 1024)
"""
"""Linux only. The peak of `resource.getrusage` would include that of the parent process."""


@cli.command("load")
def benchmark_load(
    model: Annotated[
        str, typer.Option(help="'103m' (random weights of that size) or the folder of a model.")
    ] = "103m",
    dtype: Annotated[str, typer.Option(help="Precision in memory.")] = "bfloat16",
    runs: Annotated[int, typer.Option(help="Loads by each system; systems alternate.")] = 5,
) -> None:
    """Compare load_model with transformers' `from_pretrained`: time and peak memory.

    Each load is in its own process, which has loaded a tiny model before, so that the time of
    importing packages is not included.
    """
    import torch

    from llava_ray.model.build.random_model import SHAPE_103M, build_random_model

    with tempfile.TemporaryDirectory() as scratch:
        tiny = build_random_model(Path(scratch) / "tiny")
        path = Path(model)
        if model == "103m":
            path = build_random_model(Path(scratch) / "model", SHAPE_103M, dtype=torch.bfloat16)
        num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
        for run in range(runs + 1):
            for name, loader in LOADERS.items():
                code = [sys.executable, "-W", "ignore", "-c", loader + MEASURE_LOAD]
                done = subprocess.run(
                    [*code, path, tiny, dtype], capture_output=True, text=True, check=True
                )
                seconds, grown = done.stdout.split()
                if run:  # the first one only brings the file into the system's cache
                    results[name].append((float(seconds), float(grown)))
        rows = [
            LoadFigures(
                system=name,
                weights_mb=round(num_bytes / 1e6, 1),
                load_s=round(statistics.median(seconds for seconds, _ in result), 3),
                peak_mb=round(statistics.median(grown for _, grown in result) / 1e6, 1),
                peak_to_weights=round(statistics.median(g for _, g in result) / num_bytes, 3),
            )
            for name, result in results.items()
        ]
        print_table(rows)


cli.command("serve")(benchmark_serve)
cli.command("data")(benchmark_data)
cli.command("evaluate")(benchmark_evaluate)
cli.command("train")(benchmark_train)

if __name__ == "__main__":
    cli()
