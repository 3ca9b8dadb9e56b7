"""`llava-ray evaluate`: benchmarks on Ray, scores of replies from elsewhere, two runs compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from llava_ray.cli.console import explain_settings, notes, out
from llava_ray.config import (
    DEMO_MODEL,
    DtypeName,
    EngineName,
    EvaluateConfig,
    QuantizationName,
)
from llava_ray.errors import ConfigError

if TYPE_CHECKING:
    from llava_ray.evaluate.results.compare import Comparison
    from llava_ray.evaluate.results.results import TaskResult

NUM_FLIPPED = 10
app = typer.Typer()


def _help(name: str) -> str | None:
    return EvaluateConfig.model_fields[name].description


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    tasks: Annotated[
        str, typer.Option("--tasks", "--task", help="Names, with commas: scienceqa_img,pope,mme.")
    ] = "",
    data: Annotated[Path | None, typer.Option(help=_help("data"))] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=_help("output"))] = None,
    model: Annotated[str, typer.Option(help=_help("model"))] = DEMO_MODEL,
    endpoint: Annotated[str | None, typer.Option(help=_help("endpoint"))] = None,
    app: Annotated[str | None, typer.Option(help=_help("app"))] = None,
    model_name: Annotated[str, typer.Option(help=_help("model_name"))] = "",
    engine: Annotated[EngineName, typer.Option(help=_help("engine"))] = "torch",
    dtype: Annotated[DtypeName, typer.Option(help=_help("dtype"))] = "auto",
    quantization: Annotated[QuantizationName, typer.Option(help=_help("quantization"))] = "none",
    template: Annotated[str | None, typer.Option(help=_help("template"))] = None,
    num_actors: Annotated[int, typer.Option(min=1, help=_help("num_actors"))] = 1,
    num_cpus: Annotated[float, typer.Option(min=0, help=_help("num_cpus"))] = 1.0,
    num_gpus: Annotated[float, typer.Option(min=0, help=_help("num_gpus"))] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help=_help("concurrency"))] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help=_help("limit"))] = None,
    min_coverage: Annotated[float, typer.Option(min=0, max=1, help=_help("min_coverage"))] = 0.99,
    judge_endpoint: Annotated[str | None, typer.Option(help=_help("judge_endpoint"))] = None,
    judge_model: Annotated[str, typer.Option(help=_help("judge_model"))] = "gpt-4o",
    judge_wording: Annotated[str | None, typer.Option(help=_help("judge_wording"))] = None,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Ask no model: score --predictions.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(help="Replies, reviews or grades from elsewhere.")
    ] = None,
) -> None:
    """Measure a model on benchmarks; a run that was stopped goes on when it is started again."""
    if context.invoked_subcommand:
        return
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("name at least one task: --tasks scienceqa_img,pope,mme")
    if score_only:
        _print([_score_only(names, predictions, data, output, min_coverage)])
        return
    if data is None or output is None:
        raise ConfigError("name the folder of the benchmarks with --data, results with --output")
    try:
        config = EvaluateConfig(
            model=model,
            endpoint=endpoint,
            app=app,
            model_name=model_name,
            tasks=names,
            data=str(data),
            output=str(output),
            engine=engine,
            dtype=dtype,
            quantization=quantization,
            template=template,
            num_actors=num_actors,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            concurrency=concurrency,
            limit=limit,
            min_coverage=min_coverage,
            judge_endpoint=judge_endpoint,
            judge_model=judge_model,
            judge_wording=judge_wording,
        )
    except ValueError as error:
        raise ConfigError(explain_settings(error)) from error
    _print(_run(config))
    out.print(f"report: {output / 'report.html'}", markup=False)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Folder of results.")],
    after: Annotated[Path, typer.Argument(help="Another one, of the same tasks.")],
) -> None:
    """Compare two runs: paired differences with 95 % intervals, and the samples that flipped."""
    from llava_ray.evaluate.results.compare import compare_runs

    for comparison in compare_runs(before, after):
        _print_comparison(comparison)


def _run(config: EvaluateConfig) -> "list[TaskResult]":
    from llava_ray.evaluate import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    speed = TextColumn("{task.fields[rate]}")
    with Bar(*columns, speed, TimeRemainingColumn(), console=notes) as bar:
        bars = {name: bar.add_task(name, total=None, rate="") for name in config.tasks}

        def show(progress: run.EvaluateProgress) -> None:
            if progress.task not in bars:
                bars[progress.task] = bar.add_task(progress.task, total=None, rate="")
            each = bars[progress.task]
            bar.update(each, completed=progress.num_done, total=progress.num_questions)
            rate = next(task.speed for task in bar.tasks if task.id == each)
            bar.update(each, rate=f"{rate:.1f} samples/s" if rate else "")

        return run.evaluate_model(config, on_progress=show)


def _score_only(
    names: Sequence[str],
    predictions: Path | None,
    data: Path | None,
    output: Path | None,
    min_coverage: float,
) -> "TaskResult":
    from llava_ray.evaluate.rescore import score_file
    from llava_ray.evaluate.tasks import find_tasks

    if predictions is None or len(names) != 1:
        raise ConfigError("--score-only needs one --task and its --predictions")
    (task,) = find_tasks(names)
    return score_file(task, predictions, data, min_coverage=min_coverage, output=output)


def _print(results: "Sequence[TaskResult]") -> None:
    table = Table("task", "number", "value", "standard error", "scored", "coverage")
    for result in results:
        scored = (f"{result.num_scored}", f"{result.coverage:.2%}")
        if result.headline is None:
            why = "too few were scored" if result.num_scored else "nothing to score"
            table.add_row(result.task, why, "", "", *scored)
        for name, number in result.metrics.items() if result.is_covered else ():
            error = "" if number.standard_error is None else f"{number.standard_error:.2f}"
            table.add_row(result.task, name, f"{number.value:.2f}", error, *scored)
    out.print(table)
    for result in results:
        for reason, number in result.reasons.items():
            out.print(f"{result.task}: {number} x {reason}", markup=False)
        if result.note:
            out.print(f"{result.task}: no file for its server: {result.note}", markup=False)


def _print_comparison(comparison: "Comparison") -> None:
    table = Table(comparison.task, "before", "after", "difference", "95 % interval")
    for name, number in comparison.numbers.items():
        interval = number.change.interval
        shown = f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else ""
        values = f"{number.before:.2f}", f"{number.after:.2f}", f"{number.change.value:+.2f}"
        table.add_row(name, *values, shown)
    out.print(table)
    out.print(
        f"{comparison.num_both} questions answered by both, {comparison.num_one} by one or none; "
        f"{len(comparison.flipped)} scored differently"
    )
    for before, after in comparison.flipped[:NUM_FLIPPED]:
        scores = f"{before.score.value:g} -> {after.score.value:g}"
        replies = f"{before.text[:60]!r} -> {after.text[:60]!r}"
        out.print(f"  {before.question.question_id}: {scores}  {replies}", markup=False)
