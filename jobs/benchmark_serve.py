"""The benchmark of serving, run by `python jobs/benchmark.py serve`.

It sends the same requests (an image and a few words, greedy, answers of equal length) with the same
weights to this application, its engine alone, vLLM's own server, `transformers serve`, one static
batch, and LLaVA's worker, which starts a thread and a `generate` for each request. Each system runs
in its own process, which also makes the load. The machine's limit, computed from its measured
speed, is reported too.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from benchmark_limit import compute_limit, measure_rates
from benchmark_requests import Load, ServingFigures, make_question, measure
from benchmark_run import alone, print_table, watch_memory
from benchmark_systems import OPENERS, render

SYSTEMS = {
    "limit": "what the machine could do",
    "llava_ray": "this application, through HTTP",
    "engine": "its engine alone, called in one process",
    "vllm": "vLLM's server; LLAVA_RAY_VLLM_PYTHON names its Python",
    "transformers": "`transformers serve`, one request after the other",
    "batch": "transformers' `generate` of all requests in one batch",
    "generate": "a thread and a `generate` for each request, as in LLaVA's worker",
    "generate-float16": "the same in float16, as LLaVA's worker computes",
}
"""The systems that can be measured."""

NUM_SAME_IMAGE_CLIENTS = 8
"""Number of clients that ask about one image in the application's last row."""


def benchmark_serve(
    model: Annotated[
        str, typer.Option(help="'103m' (random weights of that size) or the folder of a model.")
    ] = "103m",
    clients: Annotated[str, typer.Option(help="Numbers of clients at once.")] = "1,8,32",
    max_tokens: Annotated[int, typer.Option(help="New tokens of each answer.")] = 64,
    requests_each: Annotated[int, typer.Option(help="Requests for each client.")] = 1,
    image_size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 224,
    dtype: Annotated[
        str, typer.Option(help="Precision of all; by default what the application chooses here.")
    ] = "",
    quantization: Annotated[str, typer.Option(help="Of the application: none, int8.")] = "none",
    systems: Annotated[str, typer.Option(help=f"Which of {', '.join(SYSTEMS)}.")] = "",
    plot: Annotated[Path | None, typer.Option(help="PNG of tokens/s by clients.")] = None,
) -> None:
    """Compare this application with vLLM's server, `generate`, and the machine's limit."""
    names = [name for name in systems.split(",") if name] or list(SYSTEMS)
    if unknown := set(names) - set(SYSTEMS):
        raise typer.BadParameter(f"there is no system {unknown}: choose among {', '.join(SYSTEMS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = alone(build_model, scratch) if model == "103m" else model
        counts = tuple(int(count) for count in clients.split(","))
        load = Load(folder, counts, requests_each, max_tokens, image_size, dtype, quantization)
        rows: list[ServingFigures] = []
        rates = [alone(measure_rates, load)] if "limit" in names else []
        for name in names:
            if name == "limit":
                continue
            if name == "vllm" and "LLAVA_RAY_VLLM_PYTHON" not in os.environ:
                print("vllm is left out: LLAVA_RAY_VLLM_PYTHON names no Python", flush=True)
                continue
            rows += alone(measure_system, name, load)
            if rates:
                rates.append(alone(measure_rates, load))
        if rates:
            rows += alone(compute_limit, "limit", load, rates)
        print_table(rows)
    if plot:
        draw(rows, plot)


def build_model(folder: str) -> str:
    """Write a model of 103 million random weights; return its folder, which vLLM reads too."""
    import torch

    from llava_ray.model.build.random_model import SHAPE_103M, build_random_model
    from llava_ray.model.export.export import export_model

    path = build_random_model(Path(folder) / "built", SHAPE_103M, dtype=torch.bfloat16)
    return str(export_model(str(path), Path(folder) / "model", to="hf"))


def measure_system(name: str, load: Load) -> list[ServingFigures]:
    """Start a system, send the load, stop it; return a row for each number of clients."""
    if name == "batch":
        return [measure_batch(load, count) for count in load.clients]
    rows = []
    with watch_memory() as peak, OPENERS[name](load) as ask, asyncio.Runner() as runner:
        warm = [make_question(-1 - seed, size=load.image_size) for seed in range(2)]
        runner.run(measure(name, ask, warm, clients=2))
        for count in load.clients:
            seeds = range(load.count_requests(count))
            questions = [make_question(100 * count + s, size=load.image_size) for s in seeds]
            rows.append(runner.run(measure(name, ask, questions, clients=count)))
            print(rows[-1], flush=True)
        if name == "llava_ray":
            alike = make_question(9, size=load.image_size)
            seeds = range(load.count_requests(NUM_SAME_IMAGE_CLIENTS))
            questions = [replace(make_question(9000 + s, size=1), image=alike.image) for s in seeds]
            told = f"{name}, one image"
            rows.append(runner.run(measure(told, ask, questions, clients=NUM_SAME_IMAGE_CLIENTS)))
            print(rows[-1], flush=True)
    return [replace(row, peak_mb=round(peak[0] / 1e6)) for row in rows]


def measure_batch(load: Load, clients: int) -> ServingFigures:
    """Measure one `generate` of a static batch, with one request for each client."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from llava_ray.model.loading import load_model

    with watch_memory() as peak:
        core = load_model(load.model, dtype=load.name_dtype())
        questions = [make_question(100 * clients + s, size=load.image_size) for s in range(clients)]
        inputs = [core.encode(render(core.template, each), [each.image]) for each in questions]
        ids, masks = (
            pad_sequence([each[name][0].flip(0) for each in inputs], batch_first=True).flip(1)
            for name in ("input_ids", "attention_mask")
        )
        pixels = torch.cat([each["pixel_values"] for each in inputs]).to(core.model.dtype)

        def generate(num_tokens: int) -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                core.model.generate(
                    input_ids=ids,
                    attention_mask=masks,
                    pixel_values=pixels,
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    do_sample=False,
                )
            return time.perf_counter() - start

        generate(2)  # warms up
        wall_s = generate(load.max_tokens)
    row = ServingFigures(
        "batch",
        clients,
        clients,
        round(clients / wall_s, 2),
        round(clients * load.max_tokens / wall_s, 1),
        latency_p50_s=round(wall_s, 3),
        peak_mb=round(peak[0] / 1e6),
    )
    print(row, flush=True)
    return row


def draw(rows: Sequence[ServingFigures], path: Path) -> None:
    """Plot tokens/s over the number of clients, with one line for each system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for system in dict.fromkeys(row.system for row in rows):
        mine = [row for row in rows if row.system == system]
        style = "k--" if system == "limit" else "o-"
        axes.plot([r.clients for r in mine], [r.tokens_per_s for r in mine], style, label=system)
    axes.set(xlabel="clients", ylabel="tokens/s", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
