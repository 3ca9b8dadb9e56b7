"""The output folder of a conversion: what is finished in it, and how it becomes a data set.

    part-00000.parquet         a shard
    rejects/part-00000.jsonl   rows that were left out, one JSON object per line
    _progress/                 during the conversion: its settings, and a record per finished job
    _jobs.json                 the records, once it is finished
    _index.parquet, _manifest.json   written last

Every file is written atomically, and the record of a job after its files, so an interrupted
conversion resumes with the jobs that have no record. A finished one that is run again repeats the
jobs whose input has changed; while it does, it has no manifest.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

import llava_ray
from llava_ray.config import ConvertConfig
from llava_ray.data.convert.inputs import check_places
from llava_ray.data.convert.records import JobList, ShardRecord
from llava_ray.data.manifest import (
    FORMAT,
    INDEX,
    MANIFEST,
    Manifest,
    digest_shards,
    load_manifest,
    write_index,
)
from llava_ray.data.shards import read_counts
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder, open_folder

PROGRESS = "_progress"
REJECTS = "rejects"
JOBS = "_jobs.json"
_SETTINGS = f"{PROGRESS}/settings.json"
_NUM_JOBS = f"{PROGRESS}/num_jobs.json"
_NOT_SETTINGS = {"output", "max_rejects", "num_workers", "overwrite"}
"""Fields of the configuration that do not affect the contents of the shards."""
_OURS = re.compile(
    r"part-\d+\.parquet|rejects/.*|_progress/.*|_jobs\.json|_index\.parquet|_manifest\.json"
)
_RECORD = re.compile(r"_progress/\d+\.json")
_SCRATCH = re.compile(r"(.*/)?\.[0-9a-f]{32}")


def describe_settings(config: ConvertConfig) -> dict[str, Any]:
    """Return all settings that determine what the shards hold, apart from the input's content."""
    return config.model_dump(mode="json", exclude=_NOT_SETTINGS)


def open_output(config: ConvertConfig) -> Folder:
    """Return the output folder, emptied if `overwrite` is set.

    Raises:
        ConfigError: it is inside the input or the other way round, or holds other files or a
            conversion with other settings.
    """
    check_places(config)
    output = open_folder(config.output)
    if config.overwrite:
        _clear(output)
    known, settings = _read_settings(output), describe_settings(config)
    if known is None and any(not _SCRATCH.fullmatch(name) for name in _list_all(output)):
        raise ConfigError(
            f"{config.output!r} is not empty: choose a new folder, or pass --overwrite to "
            "replace shards"
        )
    if known is not None and known != settings:
        names = [k for k in known | settings if known.get(k) != settings.get(k)]
        raise ConfigError(
            f"{config.output!r} holds a conversion with other settings ({', '.join(names)}): "
            "choose another folder, or pass --overwrite"
        )
    return output


def read_jobs(output: Folder) -> JobList:
    """Return the records of the finished jobs in a folder, of this run and of earlier ones.

    A job whose shard has been removed or cut since is not among them.
    """
    try:
        found = JobList.model_validate_json(output.read(JOBS))
    except (FileNotFoundError, ValidationError):
        found = JobList(inputs_digest="", records=[])
    records = {record.number: record for record in found.records}
    for name in output.list(".json"):
        if _RECORD.fullmatch(name):
            record = ShardRecord.model_validate_json(output.read(name))
            records[record.number] = record
    whole = [record for record in records.values() if _is_whole(output, record)]
    return JobList(inputs_digest=found.inputs_digest, records=whole)


def _is_whole(output: Folder, record: ShardRecord) -> bool:
    shard = record.shard
    return shard is None or output.measure(shard.name) == shard.num_bytes


def find_finished(output: Folder) -> Manifest | None:
    """Return the manifest if the folder holds a finished conversion whose jobs are known."""
    return load_manifest(output) if output.has(MANIFEST) and output.has(JOBS) else None


def begin_output(output: Folder, config: ConvertConfig, records: Iterable[ShardRecord]) -> None:
    """Prepare a folder in which jobs are going to be run; it is no data set until they are done.

    Args:
        output: the folder.
        config: of the conversion.
        records: of the jobs that are done.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        output.files.makedirs(output.path(PROGRESS), exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{output.address!r} cannot be written ({error.strerror or error}): choose another "
            "folder for the output"
        ) from error
    output.write(_SETTINGS, json.dumps(describe_settings(config)).encode())
    if output.has(JOBS):
        for record in records:
            write_record(output, record)
    for name in (MANIFEST, JOBS, _NUM_JOBS):
        output.remove(name)


def write_num_jobs(output: Folder, num_jobs: int) -> None:
    """Record how many jobs the whole input makes, once it has been read to its end."""
    output.write(_NUM_JOBS, json.dumps(num_jobs).encode())


def remove_surplus(output: Folder, records: Mapping[int, ShardRecord]) -> dict[int, ShardRecord]:
    """Remove the shards of jobs that the input no longer makes; return the other records."""
    num_jobs = json.loads(output.read(_NUM_JOBS))
    for number in records:
        if number >= num_jobs:
            remove_job(output, number)
    return {number: record for number, record in records.items() if number < num_jobs}


def remove_job(output: Folder, number: int) -> None:
    """Remove the files of a job, its record first."""
    output.remove(f"{PROGRESS}/{number:05d}.json")
    for name in (name_shard(number), name_rejects(number)):
        output.remove(name)


def name_shard(number: int) -> str:
    """Return the name of a job's shard."""
    return f"part-{number:05d}.parquet"


def name_rejects(number: int) -> str:
    """Return the name of the file of a job's rejected rows."""
    return f"{REJECTS}/part-{number:05d}.jsonl"


def finalize_output(
    output: Folder, config: ConvertConfig, jobs: JobList, *, template: str | None
) -> Manifest:
    """Write the index and the manifest, which make the shards a data set; return the manifest.

    Args:
        output: the folder.
        config: of the conversion.
        jobs: the records of all jobs.
        template: for which tokens were counted, if they were.
    """
    records = sorted(jobs.records, key=lambda record: record.number)
    shards = [record.shard for record in records if record.shard]
    rejects: Counter[str] = Counter()
    for record in records:
        rejects.update(record.rejects)
    write_index(output, [read_counts(output, shard.name) for shard in shards])
    manifest = Manifest(
        format=FORMAT,
        version=llava_ray.__version__,
        settings=describe_settings(config),
        model=config.model,
        template=template,
        num_samples=sum(shard.num_rows for shard in shards),
        num_images=sum(record.num_images for record in records),
        num_text_only=sum(record.num_text_only for record in records),
        rejects=dict(rejects.most_common()),
        digest=digest_shards(shards),
        shards=tuple(shards),
    )
    output.write(JOBS, jobs.model_dump_json().encode())
    output.write(MANIFEST, manifest.model_dump_json(indent=2).encode())
    output.remove(PROGRESS)
    if not rejects:
        output.remove(REJECTS)
    for name in _list_all(output):
        if _SCRATCH.fullmatch(name):  # left by a process that was killed
            output.remove(name)
    return manifest


def write_record(output: Folder, record: ShardRecord) -> None:
    """Record that all files of a job are written."""
    output.write(f"{PROGRESS}/{record.number:05d}.json", record.model_dump_json().encode())


def _read_settings(output: Folder) -> dict[str, Any] | None:
    """Return the settings of the conversion in a folder, or None if there is none."""
    if output.has(_SETTINGS):
        return json.loads(output.read(_SETTINGS))
    return load_manifest(output).settings if output.has(MANIFEST) else None


def _list_all(output: Folder) -> list[str]:
    """Return the names of all files in the folder, hidden ones included."""
    if not output.files.isdir(output.root):
        return []
    return [path[len(output.root) + 1 :] for path in output.files.find(output.root)]


def _clear(output: Folder) -> None:
    """Remove an earlier conversion.

    Raises:
        ConfigError: the folder holds files that no conversion wrote.
    """
    names = _list_all(output)
    if others := [
        name for name in names if not (_OURS.fullmatch(name) or _SCRATCH.fullmatch(name))
    ]:
        raise ConfigError(
            f"{output.address!r} holds {others[0]!r}, which no conversion wrote, so --overwrite "
            "does not remove it: choose another folder"
        )
    for name in (MANIFEST, JOBS, INDEX, PROGRESS, REJECTS, *names):
        output.remove(name)
