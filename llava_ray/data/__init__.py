"""Training data: raw data become shards once, and training streams them in a fixed order.

raw files -> sources (one pure function each: row -> Sample) -> convert (Ray Data: images read and
checked) -> shards (Parquet) and a manifest -> loader: order (which samples, from the seed alone)
-> stream (Ray actors) -> encode -> collate -> batches of one training worker.

Beside that line: validate says which samples are accepted, inspect and inspect_html show what a
folder of shards holds, and start_ray starts Ray for all of them.

Only convert/run, loader/stream and start_ray import Ray. Only loader/encode and loader/collate load
torch; encode does so through `model`.
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
