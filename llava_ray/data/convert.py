"""Converts raw data to shards on Ray Data, streaming: no more is in memory than is worked on.

    one reader                                  a pool of workers
    raw rows -> parts of converted samples  ->  pictures read and checked, tokens counted -> a shard

See `parts` for the reader, `target` for what is written, and for how a conversion goes on that was
stopped.
"""

import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayTaskError

from llava_ray.config import ConvertConfig
from llava_ray.data.check import CheckedImage, check_image
from llava_ray.data.files import Folder, check_name, find_input, open_folder
from llava_ray.data.manifest import Manifest, Shard
from llava_ray.data.parts import Draft, Part, Reject, cut_parts
from llava_ray.data.shards import ShardWriter
from llava_ray.data.sources import find_source
from llava_ray.data.target import (
    REJECTS,
    PartRecord,
    begin,
    describe_settings,
    find_finished,
    finish,
    record_part,
)
from llava_ray.errors import ConfigError, LlavaRayError, SampleError
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.data.encode import Encoder

_READS_AHEAD = 16
"""Pictures that a worker reads at once, of which each waits for a disk or a network."""
_NUM_ROWS_FOR_A_SHARE = 10_000
"""Rows before a share of rejects stops a conversion that is not at its end."""


class Progress(NamedTuple):
    """How far a conversion is: rows read, samples written, rows left out by reason."""

    num_rows: int
    num_samples: int
    rejects: dict[str, int]


def convert(
    config: ConvertConfig, *, on_progress: Callable[[Progress], None] | None = None
) -> Manifest:
    """Convert raw data to shards; go on with what an earlier run of the same has left.

    Args:
        config: what becomes what.
        on_progress: is called after each part.

    Raises:
        ConfigError: the input is not what its source expects, the output holds something else, or
            more rows were rejected than `max_rejects`.
    """
    settings = describe_settings(config)
    if manifest := find_finished(config, settings):
        return manifest
    encoder = _load_counter(config)
    target, records = begin(config, settings)
    for record in _convert_parts(config, done=frozenset(records)):
        records[record.number] = record
        progress = _add_up(records.values())
        if on_progress:
            on_progress(progress)
        _check_rejects(config, progress, is_end=False)
    progress = _add_up(records.values())
    _check_rejects(config, progress, is_end=True)
    template = encoder.template.name if encoder else None
    return finish(target, list(records.values()), settings, template=template)


def _convert_parts(config: ConvertConfig, done: frozenset[int]) -> Iterator[PartRecord]:
    """Yield a record of each part that was written, as soon as it is."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    source = _PartSource(config, done)
    parts = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=0)
    parts.context.target_max_block_size = 1  # a part is a block of its own
    parts.context.enable_progress_bars = False
    size = config.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    writer: Any = PartWriter  # Ray's types know of functions only
    written = parts.map(
        writer,
        fn_constructor_args=(config,),
        compute=ActorPoolStrategy(min_size=1, max_size=size),
        num_cpus=1,
    )
    try:
        for row in written.iter_rows():
            yield PartRecord.model_validate_json(row["record"])
    except RayTaskError as error:
        if isinstance(error.cause, LlavaRayError):
            raise error.cause from None
        raise


class _PartSource(Datasource):
    """Gives Ray Data the parts, from one process and in order."""

    def __init__(self, config: ConvertConfig, done: frozenset[int]) -> None:
        super().__init__()
        self._config, self._done = config, done

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        config, done = self._config, self._done

        def read() -> Iterable[pa.Table]:
            for part in cut_parts(config, done=done):
                yield pa.table({"part": pa.array([pickle.dumps(part)], pa.large_binary())})

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown)]


class PartWriter:
    """Writes parts as shards, in a process of its own."""

    def __init__(self, config: ConvertConfig) -> None:
        folder, _ = find_input(config.input)
        self._config = config
        self._target = open_folder(config.output)
        self._pictures = _find_pictures(config, folder)
        self._encoder = _load_counter(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Write the part in a row of Ray Data; return its record."""
        return {"record": self.write(pickle.loads(row["part"])).model_dump_json()}

    def write(self, part: Part) -> PartRecord:
        """Write a part's rejects and its shard, then that both are there."""
        name = f"part-{part.number:05d}"
        rejects: list[Reject] = []
        num_images = num_text_only = 0
        with ExitStack() as stack:
            path = stack.enter_context(self._target.write_beside(f"{name}.parquet"))
            writer = ShardWriter(path)
            for draft, images in self._read_pictures(part, rejects):
                try:
                    num_tokens = self._count_tokens(draft.sample, images)
                except SampleError as error:
                    rejects.append(_reject(draft, error))
                    continue
                writer.add(draft.sample, images, num_tokens=num_tokens)
                num_images += len(images)
                num_text_only += not images
            shard = writer.close()
            if rejects:
                lines = [json.dumps(r._asdict(), ensure_ascii=False) + "\n" for r in rejects]
                self._target.write(f"{REJECTS}/{name}.jsonl", "".join(lines).encode())
        record = PartRecord(
            number=part.number,
            num_rows=len(part.rows),
            num_images=num_images,
            num_text_only=num_text_only,
            rejects=dict(Counter(reject.reason for reject in rejects)),
            shard=Shard(name=f"{name}.parquet", **shard._asdict()) if shard.num_rows else None,
        )
        if not shard.num_rows:
            self._target.remove(f"{name}.parquet")
        record_part(self._target, record)
        return record

    def _read_pictures(
        self, part: Part, rejects: list[Reject]
    ) -> Iterator[tuple[Draft, list[CheckedImage]]]:
        """Yield the part's samples with their pictures; add those that have bad ones to rejects."""
        with ThreadPoolExecutor(_READS_AHEAD) as pool:
            for first in range(0, len(part.rows), _READS_AHEAD):
                rows = part.rows[first : first + _READS_AHEAD]
                futures = [
                    [pool.submit(self._read_picture, image) for image in row.sample.images]
                    if isinstance(row, Draft)
                    else []
                    for row in rows
                ]
                for row, reading in zip(rows, futures, strict=True):
                    if isinstance(row, Reject):
                        rejects.append(row)
                        continue
                    try:
                        files = [future.result() for future in reading]
                        yield row, [self._check(*file) for file in files]
                    except SampleError as error:
                        rejects.append(_reject(row, error))

    def _read_picture(self, image: bytes | str) -> tuple[str, bytes]:
        """Return a picture's name and its bytes."""
        if isinstance(image, bytes):
            return "the picture in the row", image
        name = check_name(image)
        try:
            return name, self._pictures.read(name, limit=self._config.limits.max_image_bytes + 1)
        except OSError as error:
            raise SampleError(
                f"the picture {name!r} cannot be read in {self._pictures.address!r} "
                f"({type(error).__name__}): put it there, or give the folder with --pictures",
                reason="image_missing",
            ) from error

    def _check(self, name: str, data: bytes) -> CheckedImage:
        return check_image(data, self._config.limits, name=name)

    def _count_tokens(self, sample: Sample, images: list[CheckedImage]) -> int | None:
        if self._encoder is None:
            return None
        sizes = [(image.width, image.height) for image in images]
        num_tokens = self._encoder.count_tokens(sample, sizes)
        limit = self._config.max_tokens
        if limit and num_tokens > limit:
            raise SampleError(
                f"it has {num_tokens} tokens, more than max_tokens {limit}: shorten it",
                reason="too_long",
            )
        return num_tokens


def _find_pictures(config: ConvertConfig, folder: Folder) -> Folder:
    """Return the folder of the pictures: as given, or where the source usually has them."""
    if config.pictures:
        return open_folder(config.pictures)
    below = find_source(config.source).pictures
    if below and folder.has(below):
        return Folder(folder.files, folder.path(below), f"{folder.address}/{below}")
    return folder


def _load_counter(config: ConvertConfig) -> "Encoder | None":
    if config.model is None:
        return None
    from llava_ray.data.encode import load_encoder  # loads torch, which nothing else here needs

    return load_encoder(config.model, template=config.template)


def _reject(draft: Draft, error: SampleError) -> Reject:
    return Reject(draft.sample.sample_id, error.reason, error.message, draft.where)


def _add_up(records: Iterable[PartRecord]) -> Progress:
    num_rows, rejects = 0, Counter[str]()
    for record in records:
        num_rows += record.num_rows
        rejects.update(record.rejects)
    return Progress(num_rows, num_rows - rejects.total(), dict(rejects.most_common()))


def _check_rejects(config: ConvertConfig, progress: Progress, *, is_end: bool) -> None:
    num_rejects, limit = sum(progress.rejects.values()), config.max_rejects
    if limit.endswith("%"):
        if not is_end and progress.num_rows < _NUM_ROWS_FOR_A_SHARE:
            return
        is_over = num_rejects > float(limit[:-1]) / 100 * progress.num_rows
    else:
        is_over = num_rejects > float(limit)
    if is_over:
        reasons = ", ".join(f"{num} {reason}" for reason, num in progress.rejects.items())
        raise ConfigError(
            f"{num_rejects} of {progress.num_rows} rows were rejected ({reasons}), more than "
            f"max_rejects {limit}: look into {config.output}/{REJECTS}, then correct the data or "
            "run again with a higher limit, which goes on from here"
        )
    if is_end and progress.num_samples == 0:
        raise ConfigError(f"no sample came out of {config.input!r}: see {config.output}/{REJECTS}")
