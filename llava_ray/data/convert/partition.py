"""Raw rows -> shard jobs: runs of consecutive converted rows, each of which becomes one shard.

First half of a conversion, before `write_shard`. It runs in one process, does only cheap work on
text, and detects duplicate samples and ids. Job k of the same input always holds the same rows, so
a conversion that was interrupted resumes with the jobs that are missing or have changed.
"""

import hashlib
from collections.abc import Iterator, Mapping

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.inputs import (
    digest_images,
    digest_model,
    digest_rows,
    digest_sample,
    list_image_names,
    open_images,
)
from llava_ray.data.convert.records import PendingSample, RejectedRow, ShardJob, ShardRecord
from llava_ray.data.sources import Source, check_options, find_source
from llava_ray.data.sources.building import BROKEN_ROW, RawRow, explain_broken
from llava_ray.data.validate import check_messages
from llava_ray.errors import ConfigError, ImageError, ImageTooLargeError, SampleError
from llava_ray.storage import Folder, find_input
from llava_ray.types import Sample

MAX_INLINE_IMAGE_BYTES = 64 << 20
"""Bytes of images inside the rows at which a job ends, after the row that exceeds them."""


def make_shard_jobs(
    config: ConvertConfig, *, done: Mapping[int, ShardRecord] | None = None
) -> Iterator[ShardJob]:
    """Yield the jobs for the raw data in order.

    Args:
        config: of the conversion.
        done: records of an earlier run; jobs of the same rows and images are marked as done.

    Raises:
        ConfigError: the data is missing, or is not what its source expects.
    """
    images, model_digest = open_images(config), digest_model(config)
    for number, rows in enumerate(_group_rows(config)):
        digest = digest_rows(rows, model_digest)
        record = done.get(number) if done else None
        is_done = (
            record is not None
            and record.rows_digest == digest
            and record.images_digest == digest_images(list_image_names(rows), images)
        )
        yield ShardJob(number, rows, digest, is_done)


def _group_rows(config: ConvertConfig) -> Iterator[list[PendingSample | RejectedRow]]:
    """Yield the rows of one shard after another."""
    source = find_source(config.source)
    check_options(config)
    folder, names = find_input(config.input)
    rows, num_bytes = [], 0
    try:
        for row in _convert_rows(source, folder, names or folder.list(""), config):
            rows.append(row)
            if isinstance(row, PendingSample):
                num_bytes += sum(len(i) for i in row.sample.images if isinstance(i, bytes))
            if len(rows) >= config.rows_per_shard or num_bytes >= MAX_INLINE_IMAGE_BYTES:
                yield rows
                rows, num_bytes = [], 0
    except OSError as error:
        raise ConfigError(
            f"{config.input!r} cannot be read ({error}): see to it, then run the same command again"
        ) from error
    if rows:
        yield rows


def _convert_rows(
    source: Source, folder: Folder, names: list[str], config: ConvertConfig
) -> Iterator[PendingSample | RejectedRow]:
    seen = _SeenSamples(renames=config.duplicate_ids == "rename")
    for raw in source.read(folder, names, config):
        sample_id = ""
        try:
            sample = _convert_row(source, raw)
            sample_id = str(sample.sample_id)
            check_messages(sample, max_chars=config.max_chars, max_images=config.limits.max_images)
            row = PendingSample(seen.admit(sample), raw.where)
        except SampleError as error:
            row = _reject(raw, sample_id, error)
        except BROKEN_ROW as error:
            row = _reject(raw, sample_id, explain_broken(error))
        yield row


def _convert_row(source: Source, raw: RawRow) -> Sample:
    try:
        return source.convert(raw.get())
    except ImageError as error:
        is_large = isinstance(error, ImageTooLargeError)
        reason = "image_oversized" if is_large else "image_corrupt"
        raise SampleError(error.message, reason=reason) from error


def _reject(raw: RawRow, sample_id: str, error: SampleError) -> RejectedRow:
    return RejectedRow(sample_id or _guess_id(raw), error.reason, error.message, raw.where)


def _guess_id(raw: RawRow) -> str:
    found = raw.row.get("id") if isinstance(raw.row, dict) else None
    return str(found) if isinstance(found, str | int) else ""


class _SeenSamples:
    """Detects repeated ids and contents, at eight bytes each per sample."""

    def __init__(self, *, renames: bool) -> None:
        self._renames = renames
        self._ids: set[bytes] = set()
        self._contents: set[bytes] = set()

    def admit(self, sample: Sample) -> Sample:
        """Return the sample, under a new id if its own is taken and renaming is on.

        Raises:
            SampleError: the same sample was seen before, or its id was and renaming is off.
        """
        content = bytes.fromhex(digest_sample(sample))[:8]
        if content in self._contents:
            raise SampleError(
                "an identical sample came before it: remove one of them", reason="duplicate"
            )
        self._contents.add(content)
        if (key := _digest(sample.sample_id)) in self._ids:
            if not self._renames:
                raise SampleError(
                    f"an earlier sample has the id {sample.sample_id!r}: make ids unique, or pass "
                    "--duplicate-ids rename",
                    reason="duplicate_id",
                )
            sample = Sample(
                f"{sample.sample_id}-{content.hex()}",
                sample.messages,
                sample.images,
                sample.source,
            )
            key = _digest(sample.sample_id)
        self._ids.add(key)
        return sample


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
