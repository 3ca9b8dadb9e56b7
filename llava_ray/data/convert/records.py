"""What passes between the halves of a conversion: rows, the job of a shard, and its record."""

from typing import NamedTuple

from pydantic import BaseModel

from llava_ray.data.manifest import Shard
from llava_ray.types import Sample


class RejectedRow(NamedTuple):
    """A row that is left out: its id (empty if unknown), the reason, a message, its location."""

    id: str
    reason: str
    message: str
    where: str


class PendingSample(NamedTuple):
    """A converted sample whose images are not read yet, and the location of its row."""

    sample: Sample
    where: str


class ShardJob(NamedTuple):
    """The rows of one shard.

    Attributes:
        number: of the job and its shard, from 0.
        rows: its rows.
        rows_digest: of the content of the rows; see `inputs.digest_rows`.
        is_done: an earlier run has written the shard from the same rows and images.
    """

    number: int
    rows: list[PendingSample | RejectedRow]
    rows_digest: str
    is_done: bool = False


class ShardRecord(BaseModel):
    """The result of a finished job.

    Attributes:
        number: of the job.
        num_rows, num_images, num_text_only: rows of the job, images and samples without one.
        rejects: number of rejected rows by reason.
        shard: the file; None if all rows were rejected.
        rows_digest: of the rows; see `inputs.digest_rows`.
        images_digest: of the states of the images; see `inputs.digest_images`.
    """

    number: int
    num_rows: int
    num_images: int
    num_text_only: int
    rejects: dict[str, int]
    shard: Shard | None
    rows_digest: str
    images_digest: str


class JobList(BaseModel):
    """What a finished conversion keeps, so that the next run repeats only what has changed.

    Attributes:
        inputs_digest: of the states of the input files; see `inputs.digest_inputs`.
        records: of all jobs, by number.
    """

    inputs_digest: str
    records: list[ShardRecord]
