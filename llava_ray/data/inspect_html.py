"""Samples as one HTML page: their images, their text, and which of it is learned.

Behind `llava-ray inspect --html`. With an encoder the page shows the text that the model reads,
with the learned tokens marked; without one it shows the messages as stored.
"""

import html
from collections.abc import Sequence

from llava_ray.data.loader.encode import Encoder
from llava_ray.data.shards import ShardRow, write_text
from llava_ray.errors import ImageError, SampleError
from llava_ray.images import to_data_url
from llava_ray.template import IGNORED, IMAGE_PLACEHOLDER

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d1d1f; background: #fff }
article { border-top: 1px solid #ddd; padding: 1rem 0 }
img { max-height: 16rem; max-width: 100%; margin: 0 .5rem .5rem 0; border-radius: 4px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f7; padding: .75rem;
  border-radius: 6px; margin: .5rem 0 }
mark { background: #b7ebc1; color: inherit }
b.image { background: #cfe3ff; font-weight: normal; border-radius: 3px; padding: 0 .2rem }
small { color: #6e6e73 }
"""


def write_page(rows: Sequence[ShardRow], *, title: str, encoder: Encoder | None = None) -> str:
    """Return a self-contained HTML page that shows samples.

    Args:
        rows: the samples.
        title: of the page.
        encoder: of the model to be trained, for the loss mask.
    """
    explained = (
        "Learned tokens are <mark>marked</mark>; each <b class='image'>image</b> is shown with its "
        "number of tokens."
        if encoder
        else "Pass a model to see which tokens are learned."
    )
    articles = "\n".join(_write_sample(row, encoder) for row in rows)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{explained}</p>\n{articles}</html>"
    )


def _write_sample(row: ShardRow, encoder: Encoder | None) -> str:
    sizes = ", ".join(f"{width} x {height}" for width, height in row.image_sizes)
    about = " · ".join(part for part in (row.sample.source, sizes) if part)
    images = "".join(_write_image(data) for data in row.sample.images)
    text = _write_tokens(row, encoder) if encoder else _write_messages(row)
    return (
        f"<article><h3>{html.escape(row.sample.sample_id)} <small>{html.escape(about)}</small></h3>"
        f"{images}{text}</article>"
    )


def _write_image(data: bytes | str) -> str:
    assert isinstance(data, bytes)
    try:
        return f"<img src='{to_data_url(data)}' alt=''>"
    except ImageError as error:
        return f"<p>{html.escape(error.message)}</p>"


def _write_messages(row: ShardRow) -> str:
    lines = [f"{message.role}: {write_text(message)}" for message in row.sample.messages]
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _write_tokens(row: ShardRow, encoder: Encoder) -> str:
    """Return the text that the model reads, with the learned tokens marked."""
    try:
        read = encoder.tokenize(row.sample)
    except SampleError as error:
        return f"<pre>{html.escape(error.message)}</pre>{_write_messages(row)}"
    counts = iter(encoder.count_image_tokens(row.image_sizes))
    written, run = "", []
    is_learned = False
    for id_, label in zip(read.input_ids, read.labels, strict=True):
        if id_ == IMAGE_PLACEHOLDER or (label != IGNORED) != is_learned:
            written += _write_run(encoder, run, is_learned=is_learned)
            run, is_learned = [], label != IGNORED
        if id_ == IMAGE_PLACEHOLDER:
            written += f"<b class='image'>image, {next(counts)} tokens</b>"
        else:
            run.append(id_)
    written += _write_run(encoder, run, is_learned=is_learned)
    num_tokens = encoder.count_tokens(row.sample, row.image_sizes)
    num_learned = sum(label != IGNORED for label in read.labels)
    return f"<pre>{written}</pre><small>{num_tokens} tokens, {num_learned} learned</small>"


def _write_run(encoder: Encoder, ids: list[int], *, is_learned: bool) -> str:
    if not ids:
        return ""
    text = html.escape(encoder.processor.tokenizer.decode(ids))
    return f"<mark>{text}</mark>" if is_learned else text
