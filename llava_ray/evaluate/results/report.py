"""Writes the report of a run: one HTML file that opens offline, with samples and their images.

results.json and samples_{task}.jsonl -> report.html: a table of tasks, their metrics, the worst
samples (most confident first), and the samples with the lowest confidence.
"""

import html
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from llava_ray import images
from llava_ray.config import LimitsConfig
from llava_ray.errors import ImageError
from llava_ray.evaluate.datasets.images import load_image
from llava_ray.evaluate.output_files import make_visible, write_text
from llava_ray.evaluate.results.samples import (
    SampleRecord,
    find_samples,
    read_results,
    read_samples,
)

NUM_SHOWN = 12
IMAGE_SIDE = 320  # pixels
_LIMITS = LimitsConfig(max_image_bytes=64 << 20, max_image_pixels=120_000_000)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d1d1f; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 1rem }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e5e5ea }
td.number { text-align: right; font-variant-numeric: tabular-nums }
section { border-top: 2px solid #1d1d1f; margin-top: 2rem }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem }
article { border: 1px solid #e5e5ea; border-radius: 8px; padding: .75rem; overflow-wrap: anywhere }
img { max-width: 100%; max-height: 14rem; border-radius: 4px }
pre { white-space: pre-wrap; margin: .4rem 0; font: inherit }
.response { background: #f5f5f7; border-radius: 6px; padding: .4rem .6rem }
small, .absent { color: #6e6e73 }
"""


def write_report(output: Path) -> Path:
    """Write report.html into a folder of results.

    Raises:
        ConfigError: the folder holds none.
    """
    results = read_results(output)
    about = " · ".join(f"{key}: {value}" for key, value in results["about"].items())
    sections = [
        _write_task(name, results["tasks"].get(name, {}), read_samples(path))
        for name, path in find_samples(output).items()
    ]
    title = f"Evaluation of {results['about'].get('name', 'a model')}"
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{_escape(title)}</h1><p><small>{_escape(about)}</small>"
        f"</p>{_write_overview(results['tasks'])}{''.join(sections)}</html>\n"
    )
    return write_text(output / "report.html", page)


def _escape(text: object) -> str:
    """Return a text as HTML that shows all of it and does nothing else."""
    return html.escape(make_visible(str(text)))


def _write_overview(tasks: dict[str, Any]) -> str:
    rows = []
    for name, task in tasks.items():
        headline = task["headline"]
        number = _number(headline) if headline else ("", "")
        shown = headline["name"] if headline else "no headline: too few responses were scored"
        unread = f"{task['num_unread']:,}" if task.get("num_unread") else ""
        link = f"<a href='#{_escape(name)}'>{_escape(name)}</a>"
        counts = f"{task['num_scored']:,} of {task['num_questions']:,}", f"{task['coverage']:.2%}"
        rows.append([link, _escape(shown), *number, *counts, unread])
    titles = ["task", "number", "value", "± standard error", "scored", "coverage", "not readable"]
    return _write_table(titles, rows)


def _write_task(name: str, task: dict[str, Any], samples: Sequence[SampleRecord]) -> str:
    scored = [sample for sample in samples if sample["score"] is not None]
    worst = sorted(scored, key=lambda s: (s["score"], -(s.get("confidence") or 0.0)))
    worst = [sample for sample in worst if sample["score"] < 1]
    unsure = sorted(
        (s for s in samples if s.get("confidence") is not None), key=lambda s: s["confidence"]
    )
    metrics = task.get("metrics", {})
    rows = [[_escape(n), *_number(each), f"{each['num_rows']:,}"] for n, each in metrics.items()]
    statuses = ", ".join(f"{num:,} {status}" for status, num in task.get("statuses", {}).items())
    reasons = [[f"{num:,}", _escape(reason)] for reason, num in task.get("reasons", {}).items()]
    return (
        f"<section id='{_escape(name)}'><h2>{_escape(name)}</h2><p>{statuses}</p>"
        + _write_table(["number", "value", "± standard error", "rows"], rows)
        + (_write_table(["rows", "not scored, because"], reasons) if reasons else "")
        + _write_samples("Worst", worst[:NUM_SHOWN])
        + _write_samples("Least certain", unsure[:NUM_SHOWN])
        + "</section>"
    )


def _number(number: dict[str, Any]) -> tuple[str, str]:
    error = number["standard_error"]
    return f"{number['value']:.2f}", "" if error is None else f"{error:.2f}"


def _write_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _write_samples(title: str, samples: Sequence[SampleRecord]) -> str:
    if not samples:
        return ""
    articles = "".join(_write_sample(sample) for sample in samples)
    return f"<h3>{title}</h3><div class='samples'>{articles}</div>"


def _write_sample(sample: SampleRecord) -> str:
    figures = "".join(_write_image(each) for each in sample["images"])
    facts = [sample["id"]]
    if sample["score"] is not None:
        facts.append(f"score {sample['score']:.2f}")
    if sample.get("confidence") is not None:
        facts.append(f"confidence {sample['confidence']:.2f}")
    about = " · ".join([*facts, sample["why"]] if sample["why"] else facts)
    return (
        f"<article>{figures}<pre>{_escape(sample['prompt'])}</pre>"
        f"<pre class='response'>{_escape(sample['response'])}</pre>"
        f"<small>{_escape(about)}</small></article>"
    )


def _write_image(reference: str) -> str:
    try:
        image = images.decode(load_image(reference), limits=_LIMITS)
    except ImageError as error:
        return f"<p class='absent'>{_escape(error.message)}</p>"
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    small = BytesIO()
    image.save(small, "JPEG", quality=80)
    return f"<img src='{images.to_data_url(small.getvalue())}' alt=''>"
