"""Batches of one training worker, prefetched by CPU processes, from any position.

    order: which samples -> readers (Ray actors): shard rows -> decode, encode, collate -> Batch

Ray Data's iterators keep no position, so a run on them cannot resume exactly. Here `order` says
what comes next, and the readers only prepare what they are told. At most `num_ahead` batches are
ready or in preparation. An actor that dies is restarted and repeats its task. The readers end when
the stream is garbage-collected.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llava_ray.config import DataConfig
from llava_ray.data.loader.collate import Batch, DroppedSample, collate
from llava_ray.data.loader.dataset import SampleReader, ShardedDatasets, make_order, open_datasets
from llava_ray.data.loader.encode import EncodedSample, load_encoder
from llava_ray.data.loader.order import Position, SampleOrder
from llava_ray.data.start_ray import start_ray
from llava_ray.errors import ConfigError, ImageError, LlavaRayError, SampleError

logger = logging.getLogger(__name__)

_PATIENCE_S = 60
"""Seconds without a batch after which the log says what the readers may be waiting for."""


@dataclass(frozen=True)
class EncoderSpec:
    """The checkpoint that samples are encoded for; see `model.load_model`."""

    path: str
    base: str | None = None
    vision_tower: str | None = None
    template: str | None = None


class WorkerRank(NamedTuple):
    """The rank of this training worker, and how a step is divided."""

    rank: int = 0
    num_workers: int = 1
    accumulation: int = 1


class _BatchTask(NamedTuple):
    """The samples of a batch to prepare."""

    numbers: np.ndarray
    is_last: bool
    resume_at: Position


def stream_batches(
    config: DataConfig,
    spec: EncoderSpec,
    *,
    worker: WorkerRank | None = None,
    start: Position | None = None,
    num_epochs: int = 1,
) -> Iterator[Batch]:
    """Yield one worker's batches in order, `accumulation` of them per step.

    Args:
        config: what to read, and how.
        spec: the checkpoint to encode for.
        worker: which part of each global batch to yield; default: all of it as one batch.
        start: where to begin: `Batch.resume_at` of the last batch that was trained on.
        num_epochs: total number of epochs, counted from the beginning of training.

    Raises:
        ConfigError: data or checkpoint are missing, or `start` belongs to another order.
    """
    datasets = open_datasets(config.datasets)
    order = make_order(config, datasets)
    start = start or order.start()
    order.check(start)
    tasks = _list_tasks(order, worker or WorkerRank(), start, num_epochs)
    if not config.num_readers:
        maker = BatchBuilder(config, spec, datasets)
        return (maker.make(task) for task in tasks)
    return _read_ahead(tasks, config, spec, datasets)


def _list_tasks(
    order: SampleOrder, worker: WorkerRank, position: Position, num_epochs: int
) -> Iterator[_BatchTask]:
    if worker.num_workers * worker.accumulation > order.batch_size:
        raise ConfigError(
            f"batch_size {order.batch_size} is less than {worker.num_workers} workers x "
            f"{worker.accumulation} accumulation steps: raise batch_size, or lower one of these"
        )
    while position.epoch < num_epochs:
        after = order.advance(position)
        micros = order.split_batch(
            position, num_workers=worker.num_workers, accumulation=worker.accumulation
        )[worker.rank]
        for i, numbers in enumerate(micros):
            yield _BatchTask(numbers, i == len(micros) - 1, after)
        position = after


def _read_ahead(
    tasks: Iterator[_BatchTask], config: DataConfig, spec: EncoderSpec, datasets: ShardedDatasets
) -> Iterator[Batch]:
    start_ray()
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote: Any = ray.remote(BatchBuilder).options(
        num_cpus=config.reader_cpus,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=this_node,  # also keeps readers out of a trainer's placement group
    )
    readers = [remote.remote(config, spec, datasets) for _ in range(config.num_readers)]
    in_flight: deque[Any] = deque()
    for reader, task in zip(cycle(readers), tasks, strict=False):
        in_flight.append(reader.make.remote(task))
        if len(in_flight) >= config.num_ahead:
            yield _receive(in_flight.popleft())
    while in_flight:
        yield _receive(in_flight.popleft())


def _receive(batch: Any) -> Batch:
    waited_s = 0
    while not ray.wait([batch], timeout=_PATIENCE_S)[0]:
        waited_s += _PATIENCE_S
        free = ray.available_resources().get("CPU", 0)
        logger.warning(
            "no batch for %d s: the readers wait for CPUs (%g are free; data.num_readers and "
            "data.reader_cpus say how many they need) or for slow storage",
            waited_s,
            free,
        )
    try:
        return ray.get(batch)
    except RayTaskError as error:
        if isinstance(error.cause, LlavaRayError):
            raise error.cause from None
        raise


class BatchBuilder:
    """Builds batches; one per reader process."""

    def __init__(self, config: DataConfig, spec: EncoderSpec, datasets: ShardedDatasets) -> None:
        self._limits = config.limits
        self._reader = SampleReader(datasets)
        self._encoder = load_encoder(
            spec.path,
            base=spec.base,
            vision_tower=spec.vision_tower,
            template=spec.template,
            max_length=config.max_length,
            truncates=config.over_long == "truncate",
        )

    def make(self, task: _BatchTask) -> Batch:
        """Return the batch of a task."""
        examples, dropped = self._encode(task.numbers.tolist())
        arrays = collate(examples, pad_token_id=self._encoder.pad_token_id)
        ids = tuple(example.sample_id for example in examples)
        return Batch(arrays, ids, dropped, task.is_last, task.resume_at)

    def _encode(
        self, numbers: Sequence[int]
    ) -> tuple[list[EncodedSample], tuple[DroppedSample, ...]]:
        examples: list[EncodedSample] = []
        dropped: list[DroppedSample] = []
        for number in numbers:
            row = self._reader.read(number)
            try:
                examples.append(self._encoder.encode(row, self._limits))
            except SampleError as error:
                dropped.append(DroppedSample(row.sample.sample_id, error.reason, error.message))
            except ImageError as error:
                dropped.append(DroppedSample(row.sample.sample_id, "image", error.message))
        return examples, tuple(dropped)
