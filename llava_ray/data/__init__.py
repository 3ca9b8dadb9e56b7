"""Data for training: raw sets become shards once, and training reads them in one exact order.

raw files -> sources (one pure function a source: row -> Sample) -> convert (Ray Data): images are
read and checked -> shards (Parquet) and a manifest -> plan: the order of an epoch, from the seed
alone -> stream (Ray actors): decode, encode, collate -> batches for a training worker.

Only `convert` and `stream` run on Ray, and only `collate` knows torch.
"""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.data.convert.run import convert_dataset
    from llava_ray.data.loader.stream import stream_batches

__all__ = ["convert_dataset", "stream_batches"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {
        "convert_dataset": "llava_ray.data.convert.run",
        "stream_batches": "llava_ray.data.loader.stream",
    },
)
