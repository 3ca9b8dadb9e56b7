"""The data sets of a training run: opens their manifests and locates samples in their shards.

Between the shards and `order`, which works on sample numbers only.
"""

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from llava_ray.config import DataConfig, DatasetConfig
from llava_ray.data.loader.order import MixtureComponent, SampleOrder
from llava_ray.data.manifest import Manifest, load_index, load_manifest
from llava_ray.data.shards import ShardReader, ShardRow
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder, open_folder

_MAX_OPEN_SHARDS = 32


class SampleLocation(NamedTuple):
    """Where a sample is stored: data set, shard and row, each counted from 0."""

    dataset: int
    shard: int
    row: int


@dataclass(frozen=True)
class ShardedDatasets:
    """Several data sets, concatenated: samples are numbered through all of them.

    Attributes:
        folders: where the data sets are.
        manifests: of the data sets.
        ends: for each data set, the cumulative number of samples at the end of each shard.
    """

    folders: tuple[Folder, ...]
    manifests: tuple[Manifest, ...]
    ends: tuple[tuple[int, ...], ...]

    def locate(self, number: int) -> SampleLocation:
        """Return the location of a sample by its number."""
        for dataset, ends in enumerate(self.ends):
            if number < ends[-1]:
                shard = bisect_right(ends, number)
                return SampleLocation(dataset, shard, number - (ends[shard - 1] if shard else 0))
            number -= ends[-1]
        raise IndexError(number)


class SampleReader:
    """Reads samples by number; keeps recently used shards open. Threads may share a reader."""

    def __init__(self, datasets: ShardedDatasets) -> None:
        self._datasets = datasets
        self._open: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int) -> ShardRow:
        """Return a sample by its number."""
        location = self._datasets.locate(number)
        return self._open_shard(location).read(location.row)

    def _open_shard(self, location: SampleLocation) -> ShardReader:
        key = (location.dataset, location.shard)
        with self._lock:
            if key not in self._open:
                if len(self._open) >= _MAX_OPEN_SHARDS:
                    # Not closed here: another thread may be reading it. Python closes it after.
                    self._open.popitem(last=False)
                name = self._datasets.manifests[location.dataset].shards[location.shard].name
                self._open[key] = ShardReader(self._datasets.folders[location.dataset], name)
            self._open.move_to_end(key)
            return self._open[key]


def open_datasets(datasets: Sequence[DatasetConfig]) -> ShardedDatasets:
    """Open data sets, reading only their manifests.

    Raises:
        ConfigError: a data set is missing, unfinished or empty.
    """
    folders = tuple(open_folder(dataset.path) for dataset in datasets)
    manifests = tuple(load_manifest(folder) for folder in folders)
    for dataset, manifest in zip(datasets, manifests, strict=True):
        if not manifest.num_samples:
            raise ConfigError(f"{dataset.path!r} has no samples: remove it from the datasets")
    ends = tuple(tuple(accumulate(s.num_rows for s in m.shards)) for m in manifests)
    return ShardedDatasets(folders, manifests, ends)


def make_order(config: DataConfig, datasets: ShardedDatasets) -> SampleOrder:
    """Return the order in which training reads the data sets.

    Raises:
        ConfigError: `grouping` is "length" but tokens were not counted.
    """
    words, tokens, images = (
        np.concatenate([_read_column(folder, name) for folder in datasets.folders])
        for name in ("num_words", "num_tokens", "num_images")
    )
    if config.grouping == "length" and (tokens < 0).any():
        raise ConfigError(
            "grouping='length' needs token counts, which are missing in some of "
            f"{[dataset.path for dataset in config.datasets]}: convert them with --model, or set "
            "grouping='modality'"
        )
    digests = "\n".join(manifest.digest for manifest in datasets.manifests)
    order = SampleOrder(
        mixture=tuple(
            MixtureComponent(
                manifest.num_samples, dataset.weight, dataset.max_samples, dataset.seed
            )
            for dataset, manifest in zip(config.datasets, datasets.manifests, strict=True)
        ),
        lengths=words if (tokens < 0).any() else tokens,
        has_images=images > 0,
        batch_size=config.batch_size,
        seed=config.seed,
        grouping=config.grouping,
        data_id=hashlib.sha256(digests.encode()).hexdigest(),
    )
    if not order.num_batches:
        raise ConfigError("the data sets' weights leave no sample in an epoch: raise them")
    return order


def _read_column(folder: Folder, name: str) -> np.ndarray:
    """Return a column of the index, with -1 for null."""
    return load_index(folder).column(name).fill_null(-1).to_numpy().astype(np.int64)
