"""The output folder of a conversion: what is finished in it, and how it becomes a data set.

    part-00000.parquet         a shard
    rejects/part-00000.jsonl   rows that were left out, one JSON object per line
    _progress/                 during the conversion: its settings, and a record per finished job
    _index.parquet, _manifest.json   written last

Every file is written atomically, and the record of a job after its files, so an interrupted
conversion resumes with the jobs that have no record.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

import llava_ray
from llava_ray.config import ConvertConfig
from llava_ray.data.manifest import (
    FORMAT,
    INDEX,
    MANIFEST,
    Manifest,
    Shard,
    digest_shards,
    load_manifest,
    write_index,
)
from llava_ray.data.shards import read_counts
from llava_ray.data.sources.building import digest_content
from llava_ray.data.sources.pairs import ENDINGS
from llava_ray.errors import ConfigError
from llava_ray.storage import Folder, find_input, open_folder

PROGRESS = "_progress"
REJECTS = "rejects"
_SETTINGS = f"{PROGRESS}/settings.json"
_NOT_SETTINGS = {"output", "max_rejects", "num_workers", "overwrite"}
"""Fields of the configuration that do not affect the contents of the shards."""
_OURS = re.compile(r"part-\d+\.parquet|rejects/.*|_progress/.*|_index\.parquet|_manifest\.json")
_SCRATCH = re.compile(r"(.*/)?\.[0-9a-f]{32}")


class ShardRecord(BaseModel):
    """The result of a finished job."""

    number: int
    num_rows: int
    num_images: int
    num_text_only: int
    rejects: dict[str, int]
    shard: Shard | None


def describe_settings(config: ConvertConfig) -> dict[str, Any]:
    """Return all settings that determine the shards, with a digest of the input's file sizes."""
    folder, names = find_input(config.input)
    files = [n for n in names or folder.list("") if not n.lower().endswith(ENDINGS)]
    sizes = [(name, folder.files.size(folder.path(name))) for name in files]
    settings = config.model_dump(exclude=_NOT_SETTINGS)
    return settings | {"input_digest": digest_content(sizes)}


def prepare_output(
    config: ConvertConfig, settings: dict[str, Any]
) -> tuple[Folder, dict[int, ShardRecord]]:
    """Prepare the output folder; return it with the records of finished jobs by number.

    Raises:
        ConfigError: the folder holds other files or another conversion.
    """
    output = open_folder(config.output)
    if config.overwrite:
        _clear(output)
    if output.has(_SETTINGS):
        if json.loads(output.read(_SETTINGS)) != settings:
            raise ConfigError(
                f"{config.output!r} holds an unfinished conversion with other settings or of other "
                "files: choose another folder, or pass "
                "--overwrite"
            )
    elif any(not _SCRATCH.fullmatch(name) for name in _list_all(output)):
        raise ConfigError(
            f"{config.output!r} is not empty: choose a new folder, or pass --overwrite to "
            "replace shards"
        )
    else:
        output.files.makedirs(output.root, exist_ok=True)
        output.files.makedirs(output.path(PROGRESS), exist_ok=True)
        output.write(_SETTINGS, json.dumps(settings).encode())
    return output, {record.number: record for record in _read_records(output)}


def find_finished(config: ConvertConfig, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest if the output already holds this same conversion, finished."""
    output = open_folder(config.output)
    if config.overwrite or not output.has(MANIFEST):
        return None
    manifest = load_manifest(output)
    return manifest if manifest.settings == settings else None


def finalize_output(
    output: Folder,
    records: Sequence[ShardRecord],
    settings: dict[str, Any],
    *,
    template: str | None,
) -> Manifest:
    """Write the index and the manifest, which make the shards a data set; return the manifest."""
    records = sorted(records, key=lambda record: record.number)
    shards = [record.shard for record in records if record.shard]
    rejects: Counter[str] = Counter()
    for record in records:
        rejects.update(record.rejects)
    write_index(output, [read_counts(output, shard.name) for shard in shards])
    manifest = Manifest(
        format=FORMAT,
        version=llava_ray.__version__,
        settings=settings,
        model=settings["model"],
        template=template,
        num_samples=sum(shard.num_rows for shard in shards),
        num_images=sum(record.num_images for record in records),
        num_text_only=sum(record.num_text_only for record in records),
        rejects=dict(rejects.most_common()),
        digest=digest_shards(shards),
        shards=tuple(shards),
    )
    output.write(MANIFEST, manifest.model_dump_json(indent=2).encode())
    output.remove(PROGRESS)
    for name in _list_all(output):
        if _SCRATCH.fullmatch(name):  # left by a process that was killed
            output.remove(name)
    return manifest


def write_record(output: Folder, record: ShardRecord) -> None:
    """Record that all files of a job are written."""
    output.write(f"{PROGRESS}/{record.number:05d}.json", record.model_dump_json().encode())


def _read_records(output: Folder) -> list[ShardRecord]:
    names = [name for name in output.list(".json") if name.startswith(f"{PROGRESS}/")]
    return [ShardRecord.model_validate_json(output.read(n)) for n in names if n != _SETTINGS]


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
    for name in (MANIFEST, INDEX, PROGRESS, REJECTS, *names):
        output.remove(name)
