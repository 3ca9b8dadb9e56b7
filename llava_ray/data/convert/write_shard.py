"""Runs one shard job: reads and checks its images, counts its tokens, writes the shard.

Second half of a conversion, after `partition`; runs in several processes. It does not know Ray.
"""

import errno
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.inputs import digest_images, list_image_names, open_images
from llava_ray.data.convert.output import name_rejects, name_shard, remove_job, write_record
from llava_ray.data.convert.records import PendingSample, RejectedRow, ShardJob, ShardRecord
from llava_ray.data.manifest import Shard
from llava_ray.data.shards import ShardWriter
from llava_ray.data.validate import CheckedImage, check_image
from llava_ray.errors import ConfigError, LlavaRayError, SampleError
from llava_ray.storage import check_name, open_folder
from llava_ray.template.tokens import join_text
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.data.loader.encode import Encoder

_READS_AHEAD = 16
"""Images that a worker reads concurrently, because each read waits for a disk or a network."""
_UNREADABLE = "unreadable"
"""Digest of images of which one could not be read. It equals no other, so they are tried again."""

_NO_SUCH_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError)
_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
_runners: dict[str, "ShardJobRunner"] = {}


def load_token_counter(config: ConvertConfig) -> "Encoder | None":
    """Return the encoder that counts tokens, or None if the configuration names no model."""
    if config.model is None:
        return None
    from llava_ray.data.loader.encode import load_encoder  # not above: it loads torch

    return load_encoder(config.model, template=config.template)


def run_shard_job(row: dict[str, Any], config: ConvertConfig, run_id: str) -> dict[str, bytes]:
    """Run the job in a row of Ray Data; return its record, or the error that ends the conversion.

    Errors are passed on as values: if they were raised, Ray would wrap them and print their traces.

    Args:
        row: a pickled job, or an error that is to be passed on.
        config: of the conversion.
        run_id: differs for each run of a conversion.
    """
    job = pickle.loads(row["job"])
    if isinstance(job, LlavaRayError):
        return {"result": row["job"]}
    try:
        result: ShardRecord | LlavaRayError = _get_runner(config, run_id).run(job)
    except LlavaRayError as error:
        result = error
    except OSError as error:
        result = ConfigError(
            f"{name_shard(job.number)!r} in {config.output!r} cannot be written ({error}): see to "
            "it, then run the same command again"
        )
    return {"result": pickle.dumps(result)}


class ShardJobRunner:
    """Runs shard jobs; one per worker process and run."""

    def __init__(self, config: ConvertConfig) -> None:
        self._config = config
        self._output = open_folder(config.output)
        self._images = open_images(config)
        self._encoder = load_token_counter(config)

    def run(self, job: ShardJob) -> ShardRecord:
        """Write the shard of a job and its rejects, then the record that both are complete.

        Raises:
            DiskFullError: there is no room for the shard.
        """
        remove_job(self._output, job.number)
        images_digest = digest_images(list_image_names(job.rows), self._images)
        rejects: list[RejectedRow] = []
        counts = Counter[str]()
        name = name_shard(job.number)
        with (
            self._output.write_beside(name, num_bytes=self._estimate_bytes(job)) as path,
            ShardWriter(path) as writer,
        ):
            for pending, images in self._read_images(job, rejects):
                try:
                    num_tokens = self._count_tokens(pending.sample, images)
                except SampleError as error:
                    rejects.append(_reject(pending, error))
                    continue
                writer.add(pending.sample, images, num_tokens=num_tokens)
                counts["images"] += len(images)
                counts["text_only"] += not images
            shard = writer.close()
        if not shard.num_rows:
            self._output.remove(name)
        if rejects:
            lines = [json.dumps(r._asdict(), ensure_ascii=False) + "\n" for r in rejects]
            data = "".join(lines).encode(errors="backslashreplace")
            self._output.write(name_rejects(job.number), data)
        is_unreadable = any(reject.reason == "image_unreadable" for reject in rejects)
        record = ShardRecord(
            number=job.number,
            num_rows=len(job.rows),
            num_images=counts["images"],
            num_text_only=counts["text_only"],
            rejects=dict(Counter(reject.reason for reject in rejects)),
            shard=Shard(name=name, **shard._asdict()) if shard.num_rows else None,
            rows_digest=job.rows_digest,
            images_digest=_UNREADABLE if is_unreadable else images_digest,
        )
        write_record(self._output, record)
        return record

    def _estimate_bytes(self, job: ShardJob) -> int:
        """Return about how many bytes a job's shard takes: those of its images and texts."""
        samples = [row.sample for row in job.rows if isinstance(row, PendingSample)]
        num_bytes = sum(len(join_text(m)) for sample in samples for m in sample.messages)
        for sample in samples:
            inline = [image for image in sample.images if isinstance(image, bytes)]
            num_bytes += sum(len(image) for image in inline)
        sizes = [self._images.measure(name) for name in list_image_names(job.rows)]
        return num_bytes + sum(min(s, self._config.limits.max_image_bytes) for s in sizes)

    def _read_images(
        self, job: ShardJob, rejects: list[RejectedRow]
    ) -> Iterator[tuple[PendingSample, list[CheckedImage]]]:
        """Yield the job's samples with their images; append rows with bad images to `rejects`."""
        with ThreadPoolExecutor(_READS_AHEAD) as pool:
            for first in range(0, len(job.rows), _READS_AHEAD):
                rows = job.rows[first : first + _READS_AHEAD]
                futures = [
                    [pool.submit(self._read_image, image) for image in row.sample.images]
                    if isinstance(row, PendingSample)
                    else []
                    for row in rows
                ]
                for row, reading in zip(rows, futures, strict=True):
                    if isinstance(row, RejectedRow):
                        rejects.append(row)
                        continue
                    try:
                        files = [future.result() for future in reading]
                        yield row, [self._check(*file) for file in files]
                    except SampleError as error:
                        rejects.append(_reject(row, error))

    def _read_image(self, image: bytes | str) -> tuple[str, bytes]:
        """Return the name and the bytes of an image."""
        if isinstance(image, bytes):
            return "the image inside the row", image
        name = check_name(image)
        try:
            return name, self._images.read(name, limit=self._config.limits.max_image_bytes + 1)
        except (OSError, ValueError) as error:
            is_missing = isinstance(error, _NO_SUCH_FILE) or error.errno in _NO_SUCH_NAME
            if not is_missing:
                raise SampleError(
                    f"the image {name[:200]!r} cannot be read in {self._images.address!r} "
                    f"({error}): run the same command again when it can",
                    reason="image_unreadable",
                ) from error
            raise SampleError(
                f"there is no image {name[:200]!r} in {self._images.address!r}: put it there, or "
                "pass its folder with --images",
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
                f"the sample has {num_tokens} tokens, more than max_tokens={limit}: shorten it or "
                "raise the limit",
                reason="too_long",
            )
        return num_tokens


def _get_runner(config: ConvertConfig, run_id: str) -> ShardJobRunner:
    """Return this process's runner, made anew for each run: tokenizer and folders may change."""
    if run_id not in _runners:
        _runners.clear()
        _runners[run_id] = ShardJobRunner(config)
    return _runners[run_id]


def _reject(pending: PendingSample, error: SampleError) -> RejectedRow:
    return RejectedRow(pending.sample.sample_id, error.reason, error.message, pending.where)
