"""The order of training: which samples are in global batch k, and which worker gets them.

A pure function of the seed, the epoch and the manifests, so every process computes the same order.
Batch k holds the same samples on any number of workers and with any gradient accumulation; only
its division among them differs. A `Position`, four integers, says where training stands.

Random order comes from hashing indices (splitmix64, Steele et al. 2014) rather than from NumPy's
generators, whose streams may change between versions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from llava_ray.errors import ConfigError

Grouping = Literal["none", "modality", "length"]

_WINDOW_BATCHES = 50
"""Batches per window that is sorted by length: enough for similar lengths in a batch, few enough to
keep the order random.
"""


class Position(NamedTuple):
    """Where training stands: before global batch `batch` of `epoch`.

    Attributes:
        seed: of the order.
        epoch, batch: counted from 0.
        fingerprint: hash of data, mixture, batch size and grouping; another means another order.
    """

    seed: int
    epoch: int
    batch: int
    fingerprint: int


class MixtureComponent(NamedTuple):
    """One data set of a mixture; see `config.DatasetConfig`."""

    num_samples: int
    weight: float = 1.0
    max_samples: int | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The order of all epochs.

    Samples are numbered through all data sets, in the order of `mixture`.

    Attributes:
        mixture: the data sets, with their weights.
        lengths: of each sample, in tokens or words.
        has_images: whether each sample has images.
        batch_size: samples per global batch; the last batch of an epoch holds the remainder.
        seed: determines the order.
        grouping: what the samples of a batch have in common.
        data_id: hash of the contents of the data sets.
    """

    mixture: tuple[MixtureComponent, ...]
    lengths: np.ndarray
    has_images: np.ndarray
    batch_size: int
    seed: int = 0
    grouping: Grouping = "none"
    data_id: str = ""

    @property
    def num_batches(self) -> int:
        """Global batches per epoch."""
        return -(-len(self.order_epoch(0)) // self.batch_size)

    def start(self) -> Position:
        """Return the position before the first batch."""
        return Position(self.seed, 0, 0, self._fingerprint)

    def advance(self, position: Position) -> Position:
        """Return the position after the batch at a position."""
        epoch, batch = position.epoch, position.batch + 1
        if batch >= self.num_batches:
            epoch, batch = epoch + 1, 0
        return position._replace(epoch=epoch, batch=batch)

    def check(self, position: Position) -> None:
        """Check that a saved position belongs to this order.

        Raises:
            ConfigError: data, batch size, grouping or seed have changed since it was saved.
        """
        if (position.seed, position.fingerprint) != (self.seed, self._fingerprint):
            raise ConfigError(
                "the checkpoint was saved with other data, batch_size, grouping or seed, so batch "
                f"{position.batch} of epoch {position.epoch} would hold other samples: restore "
                "these settings, or start a new run"
            )

    def batch(self, position: Position) -> np.ndarray:
        """Return the samples of a global batch, longest first."""
        first = position.batch * self.batch_size
        numbers = self.order_epoch(position.epoch)[first : first + self.batch_size]
        return numbers[np.argsort(-self.lengths[numbers], kind="stable")]

    def order_epoch(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch in order; batches are consecutive slices."""
        return _order_epoch(self, epoch)

    def split_batch(
        self, position: Position, *, num_workers: int, accumulation: int = 1
    ) -> list[list[np.ndarray]]:
        """Return the micro-batches of each worker for a global batch.

        Samples of similar length share a micro-batch, and all workers process similar lengths at
        the same time. Micro-batches are empty if there are fewer samples than micro-batches.
        """
        pieces = np.array_split(self.batch(position), num_workers * accumulation)
        return [pieces[rank::num_workers] for rank in range(num_workers)]

    def measure_padding(
        self, epoch: int = 0, *, num_workers: int = 1, accumulation: int = 1
    ) -> float:
        """Return the share of an epoch's tokens that is padding, by `lengths`."""
        held = kept = 0
        for k in range(self.num_batches):
            position = Position(self.seed, epoch, k, self._fingerprint)
            for micros in self.split_batch(
                position, num_workers=num_workers, accumulation=accumulation
            ):
                for numbers in micros:
                    if len(numbers):
                        lengths = self.lengths[numbers]
                        held += int(lengths.max()) * len(numbers)
                        kept += int(lengths.sum())
        return 1 - kept / held if held else 0.0

    @property
    def _fingerprint(self) -> int:
        described = repr((self.data_id, self.mixture, self.batch_size, self.grouping))
        # The class was called Share when the first checkpoints were saved.
        described = described.replace("MixtureComponent(", "Share(")
        return int.from_bytes(hashlib.sha256(described.encode()).digest()[:6])


def draw_epoch_samples(mixture: Sequence[MixtureComponent], epoch: int) -> np.ndarray:
    """Return the samples of an epoch, each as often as its weight asks, data set by data set."""
    members: list[np.ndarray] = []
    first = 0
    for entry in mixture:
        numbers = np.arange(first, first + entry.num_samples)
        if entry.max_samples is not None:
            numbers = np.sort(shuffle(numbers, entry.seed)[: entry.max_samples])
        whole, fraction = divmod(entry.weight, 1)
        members += [numbers] * int(whole)
        members.append(shuffle(numbers, entry.seed, epoch)[: round(fraction * len(numbers))])
        first += entry.num_samples
    return np.concatenate(members)


def shuffle(numbers: np.ndarray, *key: int) -> np.ndarray:
    """Return an array's elements in an order that depends only on its length and the key."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part))
    return numbers[np.argsort(_mix(np.arange(len(numbers), dtype=np.uint64) + state))]


def _mix(values: np.ndarray) -> np.ndarray:
    """Return splitmix64 of each value."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=2)
def _order_epoch(order: SampleOrder, epoch: int) -> np.ndarray:
    members = shuffle(draw_epoch_samples(order.mixture, epoch), order.seed, epoch)
    size = order.batch_size
    if order.grouping == "none":
        return members
    if order.grouping == "modality":
        has_images = order.has_images[members]
        groups = [members[has_images], members[~has_images]]
    else:
        groups = [members]
    batches: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for group in groups:
        num_full = len(group) // size * size
        full = group[:num_full]
        if order.grouping == "length":
            full = _sort_windows(full, order.lengths, size * _WINDOW_BATCHES)
        batches += np.split(full, num_full // size) if num_full else []
        left.append(group[num_full:])
    shuffled = shuffle(np.arange(len(batches)), order.seed, epoch, 1)
    # The remainders of the groups form the last batches, which may mix modalities.
    return np.concatenate([*(batches[i] for i in shuffled), *left])


def _sort_windows(numbers: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    windows = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    return np.concatenate(
        [window[np.argsort(lengths[window], kind="stable")] for window in windows] or [numbers]
    )
