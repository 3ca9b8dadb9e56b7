"""`llava-ray evaluate`: runs benchmarks on Ray, scores stored predictions, compares two runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from llava_ray.cli.console import notes, out, print_note
from llava_ray.cli.settings import collect_settings, make_command_class, read_words
from llava_ray.config import DtypeName, EngineName, EvaluateConfig, QuantizationName
from llava_ray.config.files import build_config
from llava_ray.errors import ConfigError, UserError
from llava_ray.evaluate.output_files import make_visible

if TYPE_CHECKING:
    from llava_ray.evaluate.results.compare import Comparison
    from llava_ray.evaluate.results.results import TaskResult
    from llava_ray.evaluate.tasks import Task

NUM_FLIPPED = 10
DEFAULT = "run"


class _RunByDefault(typer.core.TyperGroup):
    """`llava-ray evaluate ...` is `llava-ray evaluate run ...`, unless another command follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if is_named else [DEFAULT, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == DEFAULT else name, command, rest  # "" keeps it out of the usage line


app = typer.Typer(cls=_RunByDefault, help="Measure models on benchmarks, and compare two runs.")


@app.callback()
def _root() -> None: ...


def _help(name: str) -> str | None:
    return EvaluateConfig.model_fields[name].description


@app.command(DEFAULT, cls=make_command_class(EvaluateConfig))
def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml|KEY=VALUE",
            show_default=False,
            help="A YAML file of settings; then settings.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "--task",
            metavar="NAME,...",
            help="Tasks, as --list-tasks names them: scienceqa_img,pope,mme.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help=_help("data"))] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help=_help("output"))
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="PATH", help=_help("model"))] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help=_help("endpoint"))] = None,
    app: Annotated[str | None, typer.Option(metavar="NAME", help=_help("app"))] = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help=_help("model_name"))
    ] = None,
    reuse: Annotated[bool | None, typer.Option("--reuse/--no-reuse", help=_help("reuse"))] = None,
    engine: Annotated[EngineName | None, typer.Option(help=_help("engine"))] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help=_help("dtype"))] = None,
    quantization: Annotated[
        QuantizationName | None, typer.Option(help=_help("quantization"))
    ] = None,
    template: Annotated[str | None, typer.Option(metavar="NAME", help=_help("template"))] = None,
    num_actors: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=_help("num_actors"))
    ] = None,
    num_cpus: Annotated[
        float | None, typer.Option(metavar="N", min=0, help=_help("num_cpus"))
    ] = None,
    num_gpus: Annotated[
        float | None, typer.Option(metavar="N", min=0, help=_help("num_gpus"))
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=_help("concurrency"))
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help=_help("limit"))] = None,
    min_coverage: Annotated[
        float | None, typer.Option(metavar="SHARE", min=0, max=1, help=_help("min_coverage"))
    ] = None,
    judge_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help=_help("judge_endpoint"))
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help=_help("judge_model"))
    ] = None,
    judge_wording: Annotated[
        str | None, typer.Option(metavar="FILE", help=_help("judge_wording"))
    ] = None,
    score_only: Annotated[
        bool,
        typer.Option("--score-only", help="Ask no model: score --predictions instead."),
    ] = False,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of predictions, reviews or grades to score."),
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list-tasks", help="List the tasks, and exit.")
    ] = False,
) -> None:
    """Measure a model on benchmarks. Run the same command again to continue a run that was stopped.

    `llava-ray evaluate compare BEFORE AFTER` compares two runs.
    """
    if list_tasks:
        _print_tasks()
        return
    flags = {
        "tasks": tasks,
        "data": data and str(data),
        "output": output and str(output),
        "model": model,
        "endpoint": endpoint,
        "app": app,
        "model_name": model_name,
        "reuse": reuse,
        "engine": engine,
        "dtype": dtype,
        "quantization": quantization,
        "template": template,
        "num_actors": num_actors,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "concurrency": concurrency,
        "limit": limit,
        "min_coverage": min_coverage,
        "judge_endpoint": judge_endpoint,
        "judge_model": judge_model,
        "judge_wording": judge_wording,
    }
    given = read_words(words)
    if given.name:
        raise ConfigError(f"{given.name!r} is not a YAML file: write settings as key=value")
    settings = collect_settings(given, flags)
    if isinstance(settings.get("tasks"), str):
        settings["tasks"] = [each.strip() for each in settings["tasks"].split(",") if each.strip()]
    if not settings.get("tasks"):
        raise ConfigError(
            "name at least one task: --tasks scienceqa_img,pope,mme; --list-tasks lists them"
        )
    if predictions and not score_only:
        raise ConfigError("--predictions is the file that --score-only scores: give both, or none")
    if score_only:
        _print([_score_only(settings, predictions)])
        return
    if not (settings.get("data") and settings.get("output")):
        raise ConfigError("name the folder of the benchmarks with --data, results with --output")
    config = build_config(EvaluateConfig, settings, source=given.file or "")
    results = _run(config)
    out.print(f"report: {Path(config.output) / 'report.html'}", markup=False)
    _print(results)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Folder of results.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another one, of the same tasks.")],
) -> None:
    """Compare two runs: paired differences with 95 % intervals, and the samples that flipped."""
    from llava_ray.evaluate import compare_runs

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

        return run.evaluate_model(config, on_progress=show, on_note=print_note)


def _score_only(settings: dict[str, Any], predictions: Path | None) -> "TaskResult":
    from llava_ray.evaluate.rescore import score_file
    from llava_ray.evaluate.tasks import find_tasks

    if predictions is None or len(settings["tasks"]) != 1:
        raise ConfigError("--score-only needs one --task and its --predictions")
    (task,) = find_tasks(settings["tasks"])
    config = build_config(EvaluateConfig, {"data": ".", "output": ".", **settings}, source="")
    data, output = (
        Path(settings[name]) if settings.get(name) else None for name in ("data", "output")
    )
    return score_file(
        task,
        predictions,
        data,
        min_coverage=config.min_coverage,
        output=output,
        judging=config,
    )


def _print_tasks() -> None:
    from llava_ray.evaluate.tasks import TASKS

    table = Table("task", "its folder", "scored by")
    for task in TASKS.values():
        table.add_row(task.name, task.folder or "any", _name_scorer(task))
    out.print(table)


def _name_scorer(task: "Task") -> str:
    if task.judge:
        return "a judge model"
    return "llava-ray" if task.score or task.score_together else "the benchmark's own server"


def _print(results: "Sequence[TaskResult]") -> None:
    """Print the numbers, and why they are not what they should be.

    Raises:
        UserError: a task has no result, or too few of its questions were scored.
    """
    table = Table("task", "number", "value", "standard error", "rows", "scored", "coverage")
    for result in results:
        scored = (f"{result.num_scored} of {result.num_questions}", f"{result.coverage:.2%}")
        if result.headline is None:
            why = "too few were scored" if result.num_scored else "nothing to score"
            table.add_row(result.task, why, "", "", "", *scored)
        for name, number in result.metrics.items() if result.is_covered else ():
            error = "" if number.standard_error is None else f"{number.standard_error:.2f}"
            cells = f"{number.value:.2f}", error, f"{number.num_rows}"
            table.add_row(result.task, _plain(name), *cells, *scored)
    out.print(table)
    for result in results:
        for reason, number in result.reasons.items():
            _say(f"{result.task}: {number} x {reason}")
        if result.num_unread:
            _say(f"{result.task}: no answer could be read out of {result.num_unread} responses")
        if result.submission:
            _say(f"{result.task}: file for its server: {result.submission}")
        if result.note:
            _say(f"{result.task}: no file for its server: {result.note}")
    if problems := [result.problem for result in results if result.problem]:
        raise UserError(make_visible("\n".join(problems)))


def _plain(text: str) -> Text:
    """A cell that is no markup, whatever the benchmark's groups are called."""
    return Text(make_visible(text))


def _say(text: str) -> None:
    out.print(make_visible(text), markup=False)


def _print_comparison(comparison: "Comparison") -> None:
    table = Table(comparison.task, "before", "after", "difference", "95 % interval")
    for name, number in comparison.numbers.items():
        interval = number.change.interval
        shown = f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else ""
        values = f"{number.before:.2f}", f"{number.after:.2f}", f"{number.change.value:+.2f}"
        table.add_row(_plain(name), *values, shown)
    out.print(table)
    out.print(
        f"{comparison.num_both} questions answered by both, {comparison.num_one} by one or none; "
        f"{len(comparison.flipped)} scored differently"
    )
    for before, after in comparison.flipped[:NUM_FLIPPED]:
        scores = f"{before.score.value:g} -> {after.score.value:g}"
        responses = f"{before.text[:60]!r} -> {after.text[:60]!r}"
        out.print(f"  {before.question.question_id}: {scores}  {responses}", markup=False)
