"""The benchmark of evaluation, run by `python jobs/benchmark.py evaluate`.

It compares the evaluation job with a loop that answers one question at a time with `generate`, as
LLaVA's scripts do, on the same model and questions; and measures memory for 1,000 and 20,000 rows.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_run import print_table, start_ray, stop_ray, watch_memory


@dataclass(frozen=True)
class RunFigures:
    """One row of the table of runs."""

    system: str
    samples: int
    samples_per_s: float  # once the model is loaded
    seconds: float  # from the start to the scores
    same_responses: str


@dataclass(frozen=True)
class MemoryFigures:
    """One row of the table of memory."""

    rows: int
    seconds: float
    peak_mb: float  # of all processes together; shared memory is counted once


def benchmark_evaluate(
    model: Annotated[str, typer.Option(help="'demo' or the folder of a model.")] = "demo",
    scenes: Annotated[int, typer.Option(help="Scenes, with about nine questions each.")] = 60,
    rows: Annotated[int, typer.Option(help="Rows of the large run for memory.")] = 20_000,
    concurrency: Annotated[int, typer.Option(help="Questions asked at once.")] = 32,
) -> None:
    """Compare the evaluation job with a loop of `generate`; measure memory as rows grow."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        folder = _write_questions(place / "scenes", scenes)
        responses = {}
        one, responses["loop"] = _ask_one_at_a_time(model, folder)
        start_ray(len(os.sched_getaffinity(0)))
        job, responses["job"] = _run_job(model, folder, place / "out", concurrency)
        num_same = sum(a == b for a, b in zip(*responses.values(), strict=True))
        same = f"{num_same} of {one.samples}"
        print_table([one, RunFigures(**{**vars(job), "same_responses": same})])
        print(f"{job.samples_per_s / one.samples_per_s:.1f} times as many samples per second")
        print_table([_measure_memory(place, number) for number in (rows // 20, rows)])
        stop_ray()


def _write_questions(folder: Path, num_scenes: int) -> Path:
    """Write questions with short answers about scenes of the embedded model."""
    from llava_ray.demo import scenes
    from llava_ray.demo.evaluate import LATER_TURNS, make_cases

    folder.mkdir()
    lines = []
    for number, case in enumerate(make_cases(num_scenes)):
        if case.kind in (LATER_TURNS, "description"):
            continue
        scenes.draw(case.scene).save(folder / f"{number}.png")
        row = {"question_id": str(number), "image": f"{number}.png", "text": case.question}
        lines.append(json.dumps({**row, "answer": case.answer}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


def _ask_one_at_a_time(model: str, folder: Path) -> tuple[RunFigures, list[str]]:
    import torch
    from PIL import Image

    from llava_ray.evaluate.tasks import TASKS
    from llava_ray.model.loading import load_model
    from llava_ray.types import ImagePart, Message, TextPart

    started = time.perf_counter()
    questions = TASKS["own_exact"].read_all(folder)
    core = load_model(model)
    responses: list[str] = []

    def ask(question: Any) -> str:
        parts = (ImagePart(b""), TextPart(question.text))
        prompt = core.template.render([Message("user", parts)])
        image = Image.open(question.images[0]).convert("RGB")
        inputs = core.encode(prompt, [image])
        with torch.inference_mode():
            ids = core.model.generate(**inputs, max_new_tokens=128, do_sample=False)
        answer = ids[0, inputs["input_ids"].shape[1] :]
        return core.tokenizer.decode(answer, skip_special_tokens=True).strip()

    ask(questions[0])  # warms up
    loaded = time.perf_counter()
    responses = [ask(question) for question in questions]
    ended = time.perf_counter()
    rate = len(questions) / (ended - loaded)
    figures = RunFigures(
        "generate, one at a time", len(questions), round(rate, 1), round(ended - started, 1), ""
    )
    return figures, responses


def _run_job(
    model: str, folder: Path, output: Path, concurrency: int
) -> tuple[RunFigures, list[str]]:
    """Run the job over a single batch of questions, then over all of them.

    Both start actors and load the model, so the difference of their times is the time of the
    additional questions.
    """
    one_s, first = _time_job(model, folder, output / "one", concurrency, limit=concurrency)
    all_s, responses = _time_job(model, folder, output / "all", concurrency, limit=None)
    if len(responses) == len(first):
        raise SystemExit("all questions fit into one batch, so no rate is known: raise --scenes")
    rate = (len(responses) - len(first)) / (all_s - one_s)
    return RunFigures("llava_ray", len(responses), round(rate, 1), round(all_s, 1), ""), responses


def _time_job(
    model: str, folder: Path, output: Path, concurrency: int, *, limit: int | None
) -> tuple[float, list[str]]:
    """Return a job's duration in seconds, and its responses."""
    from llava_ray.config import EvaluateConfig
    from llava_ray.evaluate import run

    config = EvaluateConfig(
        tasks=["own_exact"],
        model=model,
        data=str(folder),
        output=str(output),
        concurrency=concurrency,
        limit=limit,
    )
    started = time.perf_counter()
    run.evaluate_model(config)
    seconds = time.perf_counter() - started
    lines = (output / "samples_own_exact.jsonl").read_text().splitlines()
    return seconds, [json.loads(line)["response"] for line in lines]


def _measure_memory(place: Path, num_rows: int) -> MemoryFigures:
    """Measure memory with the echo engine and an image in each question."""
    from llava_ray.config import EvaluateConfig
    from llava_ray.evaluate import run

    source = place / "scenes"
    images = sorted(path.name for path in source.glob("*.png"))
    lines = [
        json.dumps(
            {
                "question_id": str(i),
                "image": images[i % len(images)],
                "text": f"What is in image {i}?",
                "answer": "nothing",
            }
        )
        for i in range(num_rows)
    ]
    (source / "questions.jsonl").write_text("\n".join(lines))
    output = place / f"out-{num_rows}"
    config = EvaluateConfig(
        tasks=["own_exact"], engine="echo", data=str(source), output=str(output)
    )
    started = time.perf_counter()
    with watch_memory() as peak:
        run.evaluate_model(config)
        seconds = time.perf_counter() - started
    return MemoryFigures(num_rows, round(seconds, 1), round(peak[0] / 1e6))
