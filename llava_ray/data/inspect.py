"""Statistics of a folder of shards for the terminal, and samples drawn from it.

Behind `llava-ray inspect`. Statistics come from the manifest and the index; the shards are read
only for the samples that are shown and for the image sizes of the first few shards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq

from llava_ray.data.loader.dataset import SampleReader, ShardedDatasets
from llava_ray.data.loader.order import Grouping, MixtureComponent, SampleOrder, shuffle
from llava_ray.data.manifest import Manifest, load_index, load_manifest
from llava_ray.data.shards import ShardRow
from llava_ray.storage import Folder, open_folder

_MAX_SHARDS_FOR_SIZES = 20
_NUM_BARS = 12
_BAR_WIDTH = 40
_BATCH_SIZE, _MICRO_SIZE = 128, 16  # as LLaVA-1.5 was trained


@dataclass(frozen=True)
class DatasetSummary:
    """Statistics of a folder of shards.

    Attributes:
        manifest: of the folder.
        num_bytes: size of all shards.
        unit: of `lengths`: "tokens" or "words".
        lengths: of each sample.
        num_images: of each sample.
        image_sizes: width and height of the images in the first shards [N, 2].
    """

    manifest: Manifest
    num_bytes: int
    unit: str
    lengths: np.ndarray
    num_images: np.ndarray
    image_sizes: np.ndarray


def summarize(address: str) -> DatasetSummary:
    """Return the statistics of a folder of shards.

    Raises:
        ConfigError: it is not a finished folder of shards.
    """
    folder = open_folder(address)
    manifest = load_manifest(folder)
    index = load_index(folder)
    has_tokens = manifest.model is not None
    unit = "tokens" if has_tokens else "words"
    return DatasetSummary(
        manifest=manifest,
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        unit=unit,
        lengths=index.column(f"num_{unit}").to_numpy(),
        num_images=index.column("num_images").to_numpy(),
        image_sizes=_read_sizes(folder, manifest),
    )


def draw_samples(address: str, *, num_samples: int, seed: int = 0) -> list[ShardRow]:
    """Return random samples of a folder of shards; the same seed draws the same ones.

    Raises:
        ConfigError: it is not a finished folder of shards.
    """
    folder = open_folder(address)
    manifest = load_manifest(folder)
    ends = tuple(np.cumsum([shard.num_rows for shard in manifest.shards]).tolist())
    reader = SampleReader(ShardedDatasets((folder,), (manifest,), (ends,)))
    numbers = shuffle(np.arange(manifest.num_samples), seed)[:num_samples]
    return [reader.read(number) for number in numbers.tolist()]


def describe(summary: DatasetSummary) -> list[str]:
    """Return a summary as lines of text."""
    manifest = summary.manifest
    lines = [
        f"{manifest.num_samples:,} samples from {manifest.source!r} in {len(manifest.shards)} "
        f"shards, {summary.num_bytes / 1e6:,.1f} MB, digest {manifest.digest[:12]}",
    ]
    if manifest.model:
        lines.append(f"tokens counted for {manifest.model} with template {manifest.template}")
    counts = Counter(summary.num_images.tolist())
    kinds = [f"{num:,} with {name_images(k)}" for k, num in sorted(counts.items())]
    lines += ["", f"images: {', '.join(kinds)}"]
    if len(summary.image_sizes):
        width, height = np.median(summary.image_sizes, axis=0)
        low, high = summary.image_sizes.min(0), summary.image_sizes.max(0)
        lines.append(
            f"image sizes: median {width:.0f} x {height:.0f}, from {low[0]} x {low[1]} to "
            f"{high[0]} x {high[1]} ({len(summary.image_sizes):,} images)"
        )
    if len(summary.lengths):
        lines += ["", f"length in {summary.unit}:", *draw_histogram(summary.lengths)]
        lines += ["", f"padding with batches of {_BATCH_SIZE} in micro-batches of {_MICRO_SIZE}:"]
        lines += [
            f"  {share:>6.1%}  grouping={name}" for name, share in _measure_padding(summary).items()
        ]
    if manifest.rejects:
        lines += ["", f"{manifest.num_rejects:,} rows rejected:"]
        lines += [f"  {num:>9,}  {reason}" for reason, num in manifest.rejects.items()]
    return lines


def _measure_padding(summary: DatasetSummary) -> dict[Grouping, float]:
    """Return the share of an epoch's tokens that is padding, for each grouping."""
    groupings: tuple[Grouping, ...] = ("none", "modality", "length")
    order = SampleOrder(
        mixture=(MixtureComponent(len(summary.lengths)),),
        lengths=summary.lengths,
        has_images=summary.num_images > 0,
        batch_size=_BATCH_SIZE,
    )
    return {
        grouping: replace(order, grouping=grouping).measure_padding(
            accumulation=_BATCH_SIZE // _MICRO_SIZE
        )
        for grouping in groupings
    }


def draw_histogram(values: Sequence[int] | np.ndarray) -> list[str]:
    """Return a histogram as lines of text, one per bin."""
    counts, edges = np.histogram(values, bins=min(_NUM_BARS, int(np.ptp(values)) + 1))
    width = len(f"{edges[-1]:,.0f}")
    return [
        f"  {edges[i]:>{width},.0f} - {edges[i + 1]:>{width},.0f}  "
        f"{'█' * -(-_BAR_WIDTH * int(count) // int(counts.max()))} {count:,}"
        for i, count in enumerate(counts)
    ]


def name_images(num: int) -> str:
    """Return a number of images in words."""
    return {0: "none", 1: "one"}.get(num, f"{num}")


def _read_sizes(folder: Folder, manifest: Manifest) -> np.ndarray:
    """Return width and height of the images in the first shards, a large enough sample [N, 2]."""
    columns = ["images.list.element.width", "images.list.element.height"]
    sizes: list[tuple[int, int]] = []
    for shard in manifest.shards[:_MAX_SHARDS_FOR_SIZES]:
        with folder.open(shard.name) as file:
            images = pq.ParquetFile(file).read(columns).column("images").to_pylist()
        sizes += [(image["width"], image["height"]) for row in images for image in row]
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)
