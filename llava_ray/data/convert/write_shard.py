"""Runs one shard job: reads and checks its images, counts its tokens, writes the shard.

Second half of a conversion, after `partition`; runs in several processes. It does not know Ray.
"""

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.output import REJECTS, ShardRecord, write_record
from llava_ray.data.convert.partition import PendingSample, RejectedRow, ShardJob
from llava_ray.data.manifest import Shard
from llava_ray.data.shards import ShardWriter
from llava_ray.data.sources import find_source
from llava_ray.data.validate import CheckedImage, check_image
from llava_ray.errors import SampleError
from llava_ray.storage import Folder, check_name, find_input, open_folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.data.loader.encode import Encoder

_READS_AHEAD = 16
"""Images that a worker reads concurrently, because each read waits for a disk or a network."""


def load_token_counter(config: ConvertConfig) -> "Encoder | None":
    """Return the encoder that counts tokens, or None if the configuration names no model."""
    if config.model is None:
        return None
    from llava_ray.data.loader.encode import load_encoder  # not above: it loads torch

    return load_encoder(config.model, template=config.template)


class ShardJobRunner:
    """Runs shard jobs; one per worker process."""

    def __init__(self, config: ConvertConfig) -> None:
        folder, _ = find_input(config.input)
        self._config = config
        self._output = open_folder(config.output)
        self._images = _find_images(config, folder)
        self._encoder = load_token_counter(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Run the job in a row of Ray Data; return its record as JSON."""
        return {"record": self.run(pickle.loads(row["job"])).model_dump_json()}

    def run(self, job: ShardJob) -> ShardRecord:
        """Write the shard of a job and its rejects, then the record that both are complete."""
        name = f"part-{job.number:05d}"
        rejects: list[RejectedRow] = []
        num_images = num_text_only = 0
        with ExitStack() as stack:
            path = stack.enter_context(self._output.write_beside(f"{name}.parquet"))
            writer = ShardWriter(path)
            for pending, images in self._read_images(job, rejects):
                try:
                    num_tokens = self._count_tokens(pending.sample, images)
                except SampleError as error:
                    rejects.append(_reject(pending, error))
                    continue
                writer.add(pending.sample, images, num_tokens=num_tokens)
                num_images += len(images)
                num_text_only += not images
            shard = writer.close()
            if rejects:
                lines = [json.dumps(r._asdict(), ensure_ascii=False) + "\n" for r in rejects]
                self._output.write(
                    f"{REJECTS}/{name}.jsonl", "".join(lines).encode(errors="backslashreplace")
                )
        record = ShardRecord(
            number=job.number,
            num_rows=len(job.rows),
            num_images=num_images,
            num_text_only=num_text_only,
            rejects=dict(Counter(reject.reason for reject in rejects)),
            shard=Shard(name=f"{name}.parquet", **shard._asdict()) if shard.num_rows else None,
        )
        if not shard.num_rows:
            self._output.remove(f"{name}.parquet")
        write_record(self._output, record)
        return record

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
        except OSError as error:
            raise SampleError(
                f"the image {name!r} cannot be read in {self._images.address!r} "
                f"({type(error).__name__}): put it there, or pass its folder with --images",
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


def _find_images(config: ConvertConfig, folder: Folder) -> Folder:
    """Return the folder of the images: as configured, or where the source usually has them."""
    if config.images:
        return open_folder(config.images).confine()
    below = find_source(config.source).images
    if below and folder.has(below):
        return Folder(folder.files, folder.path(below), f"{folder.address}/{below}").confine()
    return folder


def _reject(pending: PendingSample, error: SampleError) -> RejectedRow:
    return RejectedRow(pending.sample.sample_id, error.reason, error.message, pending.where)
