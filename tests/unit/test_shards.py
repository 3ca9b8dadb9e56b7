"""Shards: what is written is what is read, also by many threads at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava_ray.data.loader.dataset import SampleReader, ShardedDatasets
from llava_ray.data.manifest import Manifest, Shard
from llava_ray.data.shards import MAX_GROUP_ROWS, ShardReader, ShardWriter
from llava_ray.data.sources.building import assistant, user
from llava_ray.data.validate import CheckedImage
from llava_ray.storage import Folder, open_folder
from llava_ray.types import Sample

NUM_GROUPS = 8
NUM_ROWS = NUM_GROUPS * MAX_GROUP_ROWS
NUM_THREADS = 32


def write_shard(path: Path, *, first: int = 0, num_rows: int = NUM_ROWS) -> None:
    writer = ShardWriter(path)
    for number in range(first, first + num_rows):
        data = number.to_bytes(4) * 500
        messages = (user(f"<image>\nWhich is it? {number}"), assistant(f"number {number}"))
        sample = Sample(f"row-{number}", messages, (data,), "test")
        writer.add(sample, [CheckedImage(data, 3, 4)], num_tokens=None)
    assert writer.close().num_rows == num_rows


def list_numbers(thread: int, num_rows: int) -> list[int]:
    """Return rows that jump from row group to row group, in another order for each thread."""
    return [(thread * 17 + step * 131) % num_rows for step in range(60)]


@pytest.mark.parametrize("address", ["disk", "memory"])
def test_many_threads_read_one_shard(address: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "part.parquet")
    folder = open_folder(str(tmp_path))
    if address == "memory":
        memory = open_folder("memory://threads")
        memory.write("part.parquet", (tmp_path / "part.parquet").read_bytes())
        folder = memory
    reader = ShardReader(folder, "part.parquet")

    def read(thread: int) -> list[str]:
        numbers = list_numbers(thread, NUM_ROWS)
        rows = [reader.read(number) for number in numbers]
        assert [row.sample.images[0] for row in rows] == [n.to_bytes(4) * 500 for n in numbers]
        return [row.sample.sample_id for row in rows]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = list(pool.map(read, range(NUM_THREADS)))
    assert found == [
        [f"row-{number}" for number in list_numbers(thread, NUM_ROWS)]
        for thread in range(NUM_THREADS)
    ]
    assert [row.sample.sample_id for row in reader.rows()] == [f"row-{n}" for n in range(NUM_ROWS)]


def test_many_threads_read_more_shards_than_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_ray.data.loader.dataset._MAX_OPEN_SHARDS", 2)
    num_shards, num_rows = 6, 20
    for shard in range(num_shards):
        write_shard(tmp_path / f"{shard}.parquet", first=shard * num_rows, num_rows=num_rows)
    reader = SampleReader(describe(open_folder(str(tmp_path)), num_shards, num_rows))

    def read(thread: int) -> list[str]:
        numbers = list_numbers(thread, num_shards * num_rows)
        return [reader.read(number).sample.sample_id for number in numbers]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = list(pool.map(read, range(NUM_THREADS)))
    assert found == [
        [f"row-{number}" for number in list_numbers(thread, num_shards * num_rows)]
        for thread in range(NUM_THREADS)
    ]


def describe(folder: Folder, num_shards: int, num_rows: int) -> ShardedDatasets:
    """Return shards "0.parquet", "1.parquet", ... as one data set."""
    shards = tuple(
        Shard(name=f"{i}.parquet", num_rows=num_rows, num_bytes=0, sha256="")
        for i in range(num_shards)
    )
    num_samples = num_shards * num_rows
    manifest = Manifest.model_construct(shards=shards, num_samples=num_samples)
    ends = tuple(num_rows * (i + 1) for i in range(num_shards))
    return ShardedDatasets((folder,), (manifest,), (ends,))
