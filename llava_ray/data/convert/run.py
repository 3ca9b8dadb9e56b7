"""Converts raw data to shards on Ray Data, as a stream with bounded memory.

    one reader process                        a pool of workers
    raw rows -> jobs of converted samples ->  read and check images, count tokens -> one shard each

`partition` is the reader's half, `write_shard` the workers', and `output` the folder that they fill
and the resuming of an interrupted conversion.
"""

import pickle
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.inputs import digest_inputs
from llava_ray.data.convert.output import (
    REJECTS,
    begin_output,
    finalize_output,
    find_finished,
    open_output,
    read_jobs,
    remove_surplus,
    write_num_jobs,
)
from llava_ray.data.convert.partition import make_shard_jobs
from llava_ray.data.convert.records import JobList, ShardJob, ShardRecord
from llava_ray.data.convert.write_shard import load_token_counter, run_shard_job
from llava_ray.data.manifest import Manifest
from llava_ray.data.start_ray import start_ray
from llava_ray.errors import ConfigError, LlavaRayError
from llava_ray.storage import open_folder

_MIN_ROWS_FOR_PERCENT = 10_000
"""Rows to read before a percentage of rejects may stop an unfinished conversion."""


class ConvertProgress(NamedTuple):
    """Progress of a conversion: rows read, samples written, rejected rows by reason."""

    num_rows: int
    num_samples: int
    rejects: dict[str, int]


def convert_dataset(
    config: ConvertConfig, *, on_progress: Callable[[ConvertProgress], None] | None = None
) -> Manifest:
    """Convert raw data to shards, as far as an earlier run of the same conversion has not done so.

    Jobs that did not finish are repeated, and so are those whose rows or images have changed.

    Args:
        config: input, output and rules of the conversion.
        on_progress: called after each shard.

    Raises:
        ConfigError: the input is not what its source expects, the output holds something else, or
            more rows were rejected than `max_rejects` allows.
        DiskFullError: there is no room for a shard.
    """
    output = open_output(config)
    known = read_jobs(output)
    records = {record.number: record for record in known.records}
    inputs_digest = digest_inputs(config)
    manifest = find_finished(output)
    if manifest and not _has_changed(config, records, known.inputs_digest == inputs_digest):
        return manifest
    encoder = load_token_counter(config)
    begin_output(output, config, records.values())
    written: list[ShardRecord] = []
    for record in _run_jobs(config, records):
        written.append(record)
        records[record.number] = record
        if on_progress:
            on_progress(_add_up(records.values()))
        # Of an earlier run's rejects some may be about to heal, so they count at the end only.
        _check_rejects(config, _add_up(written), is_end=False)
    records = remove_surplus(output, records)
    _check_rejects(config, _add_up(records.values()), is_end=True)
    jobs = JobList(inputs_digest=inputs_digest, records=list(records.values()))
    template = encoder.template.name if encoder else None
    return finalize_output(output, config, jobs, template=template)


def _has_changed(
    config: ConvertConfig, records: Mapping[int, ShardRecord], are_files_same: bool
) -> bool:
    """Return whether a job of a finished conversion has to be run again."""
    if are_files_same and not any(record.images_digest for record in records.values()):
        return False  # all of the input is in files that have not changed
    jobs = [job.is_done for job in make_shard_jobs(config, done=records)]
    return not all(jobs) or len(jobs) != len(records)


def _run_jobs(config: ConvertConfig, done: Mapping[int, ShardRecord]) -> Iterator[ShardRecord]:
    """Run the jobs that are not done; yield the record of each as soon as it is written."""
    start_ray()
    # With few jobs Ray Data warns that not all CPUs are needed; its threads see no local filter.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks for")
    source = _ShardJobSource(config, dict(done))
    jobs = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=0)
    jobs.context.target_max_block_size = 1  # one job per block
    jobs.context.enable_progress_bars = False
    size = config.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    run_job: Any = run_shard_job  # Ray's stubs accept functions of one argument only
    written = jobs.map(
        run_job,
        fn_args=(config, uuid.uuid4().hex),
        compute=TaskPoolStrategy(size=size),  # of actors, Ray says that it may not restart them
        num_cpus=1,
    )
    for row in written.iter_rows():
        result: ShardRecord | LlavaRayError = pickle.loads(row["result"])
        if isinstance(result, LlavaRayError):
            raise result
        yield result


class _ShardJobSource(Datasource):
    """Feeds the jobs to Ray Data, from one process and in order."""

    def __init__(self, config: ConvertConfig, done: dict[int, ShardRecord]) -> None:
        super().__init__()
        self._config, self._done = config, done

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        config, done = self._config, self._done

        def read() -> Iterable[pa.Table]:
            for job in _list_open_jobs(config, done):
                yield pa.table({"job": pa.array([pickle.dumps(job)], pa.large_binary())})

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown)]


def _list_open_jobs(
    config: ConvertConfig, done: Mapping[int, ShardRecord]
) -> Iterator[ShardJob | LlavaRayError]:
    """Yield the jobs that are not done, or the error that ends the conversion."""
    num_jobs = 0
    try:
        for job in make_shard_jobs(config, done=done):
            num_jobs += 1
            if not job.is_done:
                yield job
        write_num_jobs(open_folder(config.output), num_jobs)
    except LlavaRayError as error:
        yield error


def _add_up(records: Iterable[ShardRecord]) -> ConvertProgress:
    num_rows, rejects = 0, Counter[str]()
    for record in records:
        num_rows += record.num_rows
        rejects.update(record.rejects)
    return ConvertProgress(num_rows, num_rows - rejects.total(), dict(rejects.most_common()))


def _check_rejects(config: ConvertConfig, progress: ConvertProgress, *, is_end: bool) -> None:
    num_rejects, limit = sum(progress.rejects.values()), config.max_rejects
    if limit.endswith("%"):
        if not is_end and progress.num_rows < _MIN_ROWS_FOR_PERCENT:
            return
        is_over = num_rejects > float(limit[:-1]) / 100 * progress.num_rows
    else:
        is_over = num_rejects > float(limit)
    if is_over:
        reasons = ", ".join(f"{num} {reason}" for reason, num in progress.rejects.items())
        raise ConfigError(
            f"{num_rejects} of {progress.num_rows} rows were rejected ({reasons}), more than "
            f"max_rejects={limit}: see {config.output}/{REJECTS}, then fix the data, or run again "
            "with a higher limit to resume from here"
        )
    if is_end and progress.num_samples == 0:
        raise ConfigError(
            f"{config.input!r} yielded no samples: see the reasons in {config.output}/{REJECTS}"
        )
