"""Try a run's samples before it starts: how many cannot be used and why, and how long they are.

Used by `launch` and `dry_run`. Up to `MAX_SAMPLES` samples are read as training will read them:
tokenized, measured and their images decoded. Of each shard, the size is compared with the manifest.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llava_ray.config import DataConfig
from llava_ray.data.loader.dataset import SampleReader, ShardedDatasets
from llava_ray.data.loader.encode import Encoder
from llava_ray.data.loader.order import SampleOrder, shuffle
from llava_ray.errors import ConfigError, ImageError, SampleError

MAX_SAMPLES = 1000
"""Samples that are tried; a random choice if an epoch has more."""


@dataclass(frozen=True)
class SampleSurvey:
    """What became of the samples that were tried.

    Attributes:
        num_samples: Number of different samples in the first epoch.
        lengths: Tokens of each usable sample that was tried, by its number in the data sets.
        num_unusable: Samples that cannot be used, by reason.
        examples: The message of the first such sample, by reason.
    """

    num_samples: int
    lengths: Mapping[int, int]
    num_unusable: Mapping[str, int]
    examples: Mapping[str, str]

    @property
    def num_tried(self) -> int:
        """Number of samples that were tried."""
        return len(self.lengths) + sum(self.num_unusable.values())

    @property
    def is_complete(self) -> bool:
        """Whether all samples of the epoch were tried."""
        return self.num_tried == self.num_samples

    def describe(self) -> list[str]:
        """Return lines about the samples that cannot be used; none if all can."""
        num = sum(self.num_unusable.values())
        if not num:
            return []
        chosen = "" if self.is_complete else f" tried, of {self.num_samples:,}"
        lines = [
            f"{num:,} of {self.num_tried:,} samples{chosen} cannot be used and will be left out: "
            f"{describe_reasons(self.num_unusable)}"
        ]
        return lines + [f"  {reason}, first: {text}" for reason, text in self.examples.items()]


def survey_samples(
    config: DataConfig, datasets: ShardedDatasets, order: SampleOrder, encoder: Encoder
) -> SampleSurvey:
    """Try the samples of an epoch.

    Raises:
        ConfigError: Data cannot be read, or no sample that was tried can be used.
    """
    _check_shards(datasets)
    numbers = np.unique(order.order_epoch(0))
    tried = shuffle(numbers, config.seed)[:MAX_SAMPLES]
    reader = SampleReader(datasets)
    lengths: dict[int, int] = {}
    unusable: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for number in sorted(tried.tolist()):
        try:
            row = reader.read(number)
        except (OSError, ValueError) as error:  # pyarrow's are among these
            place = datasets.locate(number)
            name = datasets.folders[place.dataset].path(
                datasets.manifests[place.dataset].shards[place.shard].name
            )
            raise ConfigError(
                f"the shard {name!r} cannot be read ({error}): convert the data again"
            ) from error
        try:
            lengths[number] = encoder.measure(row, config.limits)
        except (SampleError, ImageError) as error:
            reason = error.reason if isinstance(error, SampleError) else "image"
            unusable[reason] += 1
            examples.setdefault(reason, error.message)
    survey = SampleSurvey(len(numbers), lengths, dict(unusable.most_common()), examples)
    if not lengths:
        paths = [dataset.path for dataset in config.datasets]
        raise ConfigError(
            f"none of the {survey.num_tried:,} samples tried of {paths} can be used "
            f"({describe_reasons(unusable)}); the first: {next(iter(examples.values()))}"
        )
    return survey


def describe_reasons(counts: Mapping[str, int]) -> str:
    """Return counts by reason in words."""
    return ", ".join(f"{num:,} {reason}" for reason, num in counts.items())


def _check_shards(datasets: ShardedDatasets) -> None:
    for folder, manifest in zip(datasets.folders, datasets.manifests, strict=True):
        for shard in manifest.shards:
            size = folder.measure(shard.name)
            if size != shard.num_bytes:
                raise ConfigError(
                    f"the shard {folder.path(shard.name)!r} has {size:,} bytes, and its manifest "
                    f"says {shard.num_bytes:,}: copy it again, or convert the data again"
                )
