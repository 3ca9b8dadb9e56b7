"""The benchmark of data, run by `python jobs/benchmark.py data`.

It measures conversion (time, and memory for 2,000 and 50,000 rows); the training stream, compared
with a torch DataLoader that encodes the same images from the same files with as many processes; and
the time to a stream's first batch at the beginning of an epoch and late in one.
"""

import dataclasses
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_run import print_table, start_ray, stop_ray, watch_memory
from PIL import Image

BATCH_SIZE = 16
WARM_BATCHES = 8
"""Left out of the throughput, because the queues are filling."""


@dataclass(frozen=True)
class StreamFigures:
    """One row of the table of streams: samples per second once the queues are full."""

    system: str
    processes: int
    samples: int
    samples_per_s: float
    first_batch_s: float


@dataclass(frozen=True)
class ConvertFigures:
    """One row of the table of conversions."""

    rows: int
    samples_per_s: float
    seconds: float
    peak_mb: float  # of all processes together; shared memory is counted once


def benchmark_data(
    rows: Annotated[int, typer.Option(help="Rows of the large conversion.")] = 50_000,
    num_streamed: Annotated[int, typer.Option(help="Samples that each system streams.")] = 2_000,
    processes: Annotated[int, typer.Option(help="Processes that prepare batches.")] = 2,
    rounds: Annotated[int, typer.Option(help="Times that each system streams, in turns.")] = 2,
) -> None:
    """Conversion, and the training stream beside a torch DataLoader over the same files."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported
    from llava_ray.config import DataConfig
    from llava_ray.data.loader.stream import EncoderSpec
    from llava_ray.model.build.random_model import TINY, build_random_model

    shape = dataclasses.replace(TINY, image_size=336, patch_size=14, context_length=2048)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = str(build_random_model(place / "model", shape))
        photos = _write_rows(place / "photos", num_streamed, size=(640, 480), num_files=1000)
        shards = place / "photo-shards"
        start_ray(processes)
        _measure_conversion(photos, shards, num_streamed)  # warms up
        small = _write_rows(place / "small", 2_000, size=(256, 192), num_files=500)
        large = _write_rows(place / "large", rows, size=(256, 192), num_files=500)
        converted = [
            _measure_conversion(small, place / "small-shards", 2_000),
            _measure_conversion(large, place / "large-shards", rows),
        ]
        print_table(converted)

        fields = {"batch_size": BATCH_SIZE, "num_readers": processes, "num_ahead": 2 * processes}
        config = DataConfig.model_validate({**fields, "datasets": [{"path": str(shards)}]})
        systems = {
            "torch DataLoader": lambda: _load_with_torch(photos, model, processes),
            "llava_ray": lambda: _stream(config, EncoderSpec(model)),
        }
        streamed: list[StreamFigures] = []
        for _ in range(rounds):
            for name, start in systems.items():
                streamed.append(_measure_stream(name, start, processes))
                print(streamed[-1], flush=True)
        print_table(streamed)

        deep = DataConfig.model_validate(
            {**fields, "datasets": [{"path": str(place / "large-shards")}]}
        )
        _compare_starts(deep, EncoderSpec(model), rounds)
        stop_ray()  # ends its readers before their files are deleted


def _write_rows(folder: Path, num_rows: int, *, size: tuple[int, int], num_files: int) -> Path:
    """Write JPEGs, and `num_rows` rows in LLaVA's JSON format, each about one of them."""
    folder.mkdir()
    for number in range(num_files):
        rng = random.Random(number)
        tiles = bytes(rng.randrange(256) for _ in range(48 * 36 * 3))
        image = Image.frombytes("RGB", (48, 36), tiles).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg", quality=90)
    words = "what which how many is are the of in on left right red blue cat dog near".split()
    rows = []
    for number in range(num_rows):
        rng = random.Random(number)
        turns = []
        for turn in range(rng.randint(1, 4)):
            question = " ".join(rng.choices(words, k=rng.randint(6, 20)))
            answer = " ".join(rng.choices(words, k=rng.randint(4, 60)))
            marker = "" if turn else "<image>\n"
            turns += [
                {"from": "human", "value": marker + question},
                {"from": "gpt", "value": answer},
            ]
        image = f"{number % num_files}.jpg"
        rows.append({"id": str(number), "image": image, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def _measure_conversion(raw: Path, out: Path, num_rows: int) -> ConvertFigures:
    from llava_ray.config import ConvertConfig
    from llava_ray.data.convert.run import convert_dataset

    config = ConvertConfig(source="llava", input=str(raw), output=str(out), rows_per_shard=500)
    with watch_memory() as peak:
        start = time.perf_counter()
        manifest = convert_dataset(config)
        seconds = time.perf_counter() - start
    assert manifest.num_samples == num_rows
    return ConvertFigures(
        rows=num_rows,
        samples_per_s=round(num_rows / seconds, 1),
        seconds=round(seconds, 1),
        peak_mb=round(peak[0] / 1e6),
    )


def _stream(config: Any, spec: Any) -> Iterable[int]:
    """Yield the number of samples of each batch of the training stream, converted to tensors."""
    from llava_ray.data.loader.stream import stream_batches

    for batch in stream_batches(config, spec):
        yield len(batch.to_tensors()["input_ids"])


class RawImages:
    """A torch dataset over LLaVA's JSON and its images, with the stream's encoding."""

    def __init__(self, raw: Path, model: str) -> None:
        self._raw, self._model = raw, model
        self._rows = json.loads((raw / "rows.json").read_text())
        self._encoder: Any = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        from llava_ray.config import LimitsConfig
        from llava_ray.data.loader.encode import load_encoder
        from llava_ray.data.shards import ShardRow
        from llava_ray.data.sources import SOURCES

        if self._encoder is None:
            self._encoder = load_encoder(self._model)
        sample = SOURCES["llava"].convert(self._rows[number])
        data = [(self._raw / str(name)).read_bytes() for name in sample.images]
        whole = dataclasses.replace(sample, images=tuple(data))
        return self._encoder.encode(ShardRow(whole, ((640, 480),) * len(data)), LimitsConfig())


def _load_with_torch(raw: Path, model: str, processes: int) -> Iterable[int]:
    """Yield the number of samples of each batch of a DataLoader."""
    from torch.utils.data import DataLoader

    dataset: Any = RawImages(raw, model)
    loader = DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=processes,
        prefetch_factor=2,
        collate_fn=_collate_to_tensors,
        multiprocessing_context="spawn",
    )
    for batch in loader:
        yield len(batch["input_ids"])


def _collate_to_tensors(examples: list[Any]) -> Any:
    import torch

    from llava_ray.data.loader.collate import collate

    arrays = collate(examples, pad_token_id=0)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _measure_stream(
    system: str, start_stream: Callable[[], Iterable[int]], processes: int
) -> StreamFigures:
    start = time.perf_counter()
    first_s = warm_at = 0.0
    num_samples = num_warm = 0
    for i, size in enumerate(start_stream()):
        num_samples += size
        if i == 0:
            first_s = time.perf_counter() - start
        if i == WARM_BATCHES:
            warm_at, num_warm = time.perf_counter(), num_samples
    rate = (num_samples - num_warm) / (time.perf_counter() - warm_at)
    return StreamFigures(system, processes, num_samples, round(rate, 1), round(first_s, 2))


def _compare_starts(config: Any, spec: Any, rounds: int) -> None:
    """Print the time to the first batch at the beginning and at nine tenths of an epoch."""
    from llava_ray.data.loader.dataset import make_order, open_datasets
    from llava_ray.data.loader.stream import stream_batches

    order = make_order(config, open_datasets(config.datasets))
    deep = order.start()._replace(batch=order.num_batches * 9 // 10)
    for _ in range(rounds):
        for name, position in (("fresh start", None), (f"resume at batch {deep.batch}", deep)):
            start = time.perf_counter()
            stream = stream_batches(config, spec, start=position)
            next(iter(stream))
            print(f"{name}: first batch after {time.perf_counter() - start:.2f} s", flush=True)
            getattr(stream, "close", lambda: None)()
