"""`llava-ray evaluate`: benchmarks, on Ray, or scores of replies from elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from llava_ray.cli.console import explain_settings, notes, out
from llava_ray.config import DEMO_MODEL, EngineName, EvaluateConfig
from llava_ray.errors import ConfigError
from llava_ray.evaluate.results import TaskResult


def _help(name: str) -> str | None:
    return EvaluateConfig.model_fields[name].description


def evaluate(
    tasks: Annotated[
        str, typer.Option("--tasks", "--task", help="Names, with commas: scienceqa_img,pope,mme.")
    ],
    data: Annotated[Path, typer.Option(help=_help("data"))],
    output: Annotated[Path | None, typer.Option("--output", "-o", help=_help("output"))] = None,
    model: Annotated[str, typer.Option(help=_help("model"))] = DEMO_MODEL,
    endpoint: Annotated[str | None, typer.Option(help=_help("endpoint"))] = None,
    app: Annotated[str | None, typer.Option(help=_help("app"))] = None,
    model_name: Annotated[str, typer.Option(help=_help("model_name"))] = "",
    engine: Annotated[EngineName, typer.Option(help=_help("engine"))] = "torch",
    template: Annotated[str | None, typer.Option(help=_help("template"))] = None,
    num_actors: Annotated[int, typer.Option(min=1, help=_help("num_actors"))] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help=_help("num_gpus"))] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help=_help("concurrency"))] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help=_help("limit"))] = None,
    min_coverage: Annotated[float, typer.Option(min=0, max=1, help=_help("min_coverage"))] = 0.99,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Ask no model: score --predictions.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(help="Replies, reviews or grades from elsewhere.")
    ] = None,
) -> None:
    """Measure a model on benchmarks; a run that was stopped goes on when it is started again."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if score_only:
        from llava_ray.evaluate.rescore import score_file
        from llava_ray.evaluate.tasks import find_tasks

        if predictions is None or len(names) != 1:
            raise ConfigError("--score-only needs one --task and its --predictions")
        (task,) = find_tasks(names)
        _print([score_file(task, predictions, data, min_coverage=min_coverage, output=output)])
        return
    if output is None:
        raise ConfigError("name a folder for the results with --output")
    try:
        config = EvaluateConfig(
            model=model, endpoint=endpoint, app=app, model_name=model_name, tasks=names,
            data=str(data), output=str(output), engine=engine, template=template,
            num_actors=num_actors, num_gpus=num_gpus, concurrency=concurrency, limit=limit,
            min_coverage=min_coverage,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(explain_settings(error)) from error

    from llava_ray.evaluate import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    speed = TextColumn("{task.fields[rate]}")
    with Bar(*columns, speed, TimeRemainingColumn(), console=notes) as bar:
        bars = {name: bar.add_task(name, total=None, rate="") for name in names}

        def show(progress: run.Progress) -> None:
            each = bars[progress.task]
            bar.update(each, completed=progress.num_done, total=progress.num_questions)
            rate = bar.tasks[each].speed
            bar.update(each, rate=f"{rate:.1f} samples/s" if rate else "")

        results = run.evaluate(config, on_progress=show)
    _print(results)


def _print(results: list[TaskResult]) -> None:
    table = Table("task", "number", "value", "standard error", "scored", "coverage")
    for result in results:
        scored = (f"{result.num_scored}", f"{result.coverage:.2%}")
        if result.headline is None:
            why = "too few were scored" if result.num_scored else "no answers here"
            table.add_row(result.task, why, "", "", *scored)
        for name, number in result.metrics.items() if result.is_covered else ():
            error = "" if number.standard_error is None else f"{number.standard_error:.2f}"
            table.add_row(result.task, name, f"{number.value:.2f}", error, *scored)
    out.print(table)
    for result in results:
        for reason, number in result.reasons.items():
            out.print(f"{result.task}: {number} x {reason}", markup=False)
