"""Batches for one training worker, prepared ahead of it by a few CPU processes, from any position.

    order: which samples -> readers (Ray actors): shard rows -> decode, encode, collate -> Batch

Ray Data's own iterators keep no position, so nothing that is to be resumed exactly can come from
them; here the order says what comes next, and readers only prepare what they are told. No more than
`num_ahead` batches are prepared or on their way, and an actor that dies is started again and does
its work once more. The readers end when nobody holds the stream any more.
"""

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
from llava_ray.data.session import start_ray
from llava_ray.errors import ConfigError, ImageError, LlavaRayError, SampleError


@dataclass(frozen=True)
class EncoderSpec:
    """The model that is trained; see `model.load_model`."""

    path: str
    base: str | None = None
    vision_tower: str | None = None
    template: str | None = None


class WorkerRank(NamedTuple):
    """Which of the training workers this is, and how a step is divided."""

    rank: int = 0
    num_workers: int = 1
    accumulation: int = 1


class _BatchTask(NamedTuple):
    """A batch to prepare."""

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
    """Yield a worker's batches in order, `accumulation` of them a step.

    Args:
        config: what is read and how.
        spec: the model that it is encoded for.
        worker: which share of each global batch is wanted; default: all of it, at once.
        start: where to begin; `Batch.resume_at` of the last batch that was trained on.
        num_epochs: the epoch before which to end, counted from the beginning of training.

    Raises:
        ConfigError: data or checkpoint are not there, or `start` belongs to other data.
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
            f"{worker.accumulation} accumulated batches: raise it, or lower these"
        )
    while position.epoch < num_epochs:
        behind = order.advance(position)
        micros = order.split_batch(
            position, num_workers=worker.num_workers, accumulation=worker.accumulation
        )[worker.rank]
        for i, numbers in enumerate(micros):
            yield _BatchTask(numbers, i == len(micros) - 1, behind)
        position = behind


def _read_ahead(
    tasks: Iterator[_BatchTask], config: DataConfig, spec: EncoderSpec, datasets: ShardedDatasets
) -> Iterator[Batch]:
    start_ray()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote: Any = ray.remote(BatchBuilder).options(
        num_cpus=config.reader_cpus,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,  # also keeps them out of a trainer's placement group
    )
    readers = [remote.remote(config, spec, datasets) for _ in range(config.num_readers)]
    waiting: deque[Any] = deque()
    for reader, task in zip(cycle(readers), tasks, strict=False):
        waiting.append(reader.make.remote(task))
        if len(waiting) >= config.num_ahead:
            yield _receive(waiting.popleft())
    while waiting:
        yield _receive(waiting.popleft())


def _receive(batch: Any) -> Batch:
    try:
        return ray.get(batch)
    except RayTaskError as error:
        if isinstance(error.cause, LlavaRayError):
            raise error.cause from None
        raise


class BatchBuilder:
    """Prepares batches, in a process of its own."""

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
