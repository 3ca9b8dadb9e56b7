"""Batches for training: exactly the samples of the plan, encoded as the model reads them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from llava_ray.config import ConvertConfig, DataConfig
from llava_ray.data.loader.collate import Batch
from llava_ray.data.loader.encode import load_encoder
from llava_ray.data.loader.stream import EncoderSpec, WorkerRank, stream_batches
from llava_ray.data.manifest import load_manifest
from llava_ray.data.shards import ShardReader
from llava_ray.errors import ConfigError
from llava_ray.images import decode
from llava_ray.model.loading import load_model
from llava_ray.storage import open_folder
from llava_ray.template import IGNORED
from tests.support.hf_checkpoints import write_published
from tests.support.llava_checkpoints import Original
from tests.support.raw_data import convert_here, llava_row, save, say, write_json, write_llava
from tests.support.tiny_checkpoint import tiny_model

pytestmark = pytest.mark.ray

NUM_ROWS = 30


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return make_shards(write_llava(folder / "raw", NUM_ROWS), folder / "shards")


def make_shards(raw: Path, out: Path, **settings: Any) -> Path:
    fields = {"source": "llava", "input": str(raw), "output": str(out), "rows_per_shard": 7}
    convert_here(ConvertConfig.model_validate(fields | settings))
    return out


def config_of(shards: Path, **settings: Any) -> DataConfig:
    fields = {"datasets": [{"path": str(shards)}], "batch_size": 8, "num_readers": 0}
    return DataConfig.model_validate(fields | settings)


def model() -> EncoderSpec:
    return EncoderSpec(str(tiny_model()))


def by_step(streams: Iterable[Iterable[Batch]]) -> list[list[str]]:
    """Return the sorted ids of each global batch, from the streams of all workers."""
    steps: dict[Any, list[str]] = {}
    for stream in streams:
        for batch in stream:
            steps.setdefault(batch.resume_at, []).extend(batch.sample_ids)
    return [sorted(ids) for _, ids in sorted(steps.items())]


def stream_all(config: DataConfig, num_workers: int, accumulation: int = 1, **options: Any):
    workers = [WorkerRank(rank, num_workers, accumulation) for rank in range(num_workers)]
    return [stream_batches(config, model(), worker=worker, **options) for worker in workers]


@pytest.mark.parametrize("grouping", ["none", "modality"])
def test_any_number_of_workers_reads_the_same_global_batches(shards: Path, grouping: str) -> None:
    config = config_of(shards, grouping=grouping)
    expected = by_step(stream_all(config, 1))
    assert sorted(i for ids in expected for i in ids) == sorted(f"row-{i}" for i in range(NUM_ROWS))
    assert [len(ids) for ids in expected] == [8, 8, 8, 6]
    for num_workers, accumulation in ((2, 1), (4, 1), (1, 3), (8, 1)):
        assert by_step(stream_all(config, num_workers, accumulation)) == expected


def test_every_worker_takes_every_step_even_if_it_gets_no_sample(shards: Path) -> None:
    batches = [list(stream) for stream in stream_all(config_of(shards), 8)]
    assert {len(of_worker) for of_worker in batches} == {4}
    (empty, *_) = [batch for of_worker in batches for batch in of_worker if not batch.sample_ids]
    assert empty.arrays["labels"].tolist() == [[IGNORED]]
    assert set(empty.arrays) == {"input_ids", "labels", "attention_mask"}
    last = [batch.is_last for batch in stream_all(config_of(shards), 1, 3)[0]]
    assert last == [False, False, True] * 4


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_training_resumes_on_another_number_of_workers(shards: Path, stopped_after: int) -> None:
    config = config_of(shards, grouping="modality", seed=stopped_after)
    before: list[str] = []
    position = None
    for batch in stream_all(config, 1, 2)[0]:
        before += batch.sample_ids
        if batch.is_last:
            stopped_after -= 1
            position = batch.resume_at
        if not stopped_after:
            break
    assert position is not None
    saved = type(position)(*json.loads(json.dumps(position)))
    after = by_step(stream_all(config, 3, start=saved))
    ids = sorted([*before, *(sample_id for step in after for sample_id in step)])
    assert ids == sorted(f"row-{i}" for i in range(NUM_ROWS))


def test_a_resumed_stream_reads_nothing_that_came_before(tmp_path: Path) -> None:
    out = make_shards(write_llava(tmp_path / "raw", 12), tmp_path / "out", rows_per_shard=1)
    config = config_of(out, batch_size=4)
    (stream,) = stream_all(config, 1)
    first = next(stream)
    for sample_id in first.sample_ids:
        (out / f"part-{int(sample_id.removeprefix('row-')):05d}.parquet").unlink()
    (resumed,) = stream_all(config, 1, start=first.resume_at)
    assert sum(len(batch.sample_ids) for batch in resumed) == 8


def test_each_epoch_has_its_own_order_and_training_ends_after_the_last(shards: Path) -> None:
    (stream,) = stream_all(config_of(shards), 1, num_epochs=2)
    batches = list(stream)
    assert len(batches) == 8
    epochs = [
        [i for batch in part for i in batch.sample_ids] for part in (batches[:4], batches[4:])
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_a_position_in_other_data_is_refused(shards: Path) -> None:
    position = next(stream_all(config_of(shards), 1)[0]).resume_at
    with pytest.raises(ConfigError, match="was saved with other data"):
        stream_all(config_of(shards, batch_size=4), 1, start=position)
    with pytest.raises(ConfigError, match="batch_size 8 is less than 3 workers x 3"):
        next(stream_all(config_of(shards), 3, 3)[0])


def test_grouping_by_length_needs_counted_tokens(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="convert them with --model"):
        stream_all(config_of(shards, grouping="length"), 1)
    raw = write_llava(tmp_path / "raw", 20)
    counted = make_shards(raw, tmp_path / "out", model=str(tiny_model()))
    (stream,) = stream_all(config_of(counted, grouping="length", batch_size=5), 1)
    spreads = [np.ptp(batch.arrays["attention_mask"].sum(1)) for batch in stream]
    assert sorted(spreads)[1] <= 3


def test_data_sets_are_mixed(shards: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "raw" / "a.json", [{"id": "text", "conversations": say("a", "b")}])
    other = make_shards(tmp_path / "raw", tmp_path / "out")
    datasets = [{"path": str(other), "weight": 3}, {"path": str(shards), "max_samples": 5}]
    (stream,) = stream_all(config_of(shards, datasets=datasets), 1)
    ids = [sample_id for batch in stream for sample_id in batch.sample_ids]
    assert ids.count("text") == 3
    assert len(set(ids)) == 6


CHECKPOINTS = {
    "square": Original(),
    "pad": Original(aspect="pad"),
    "between marks": Original(start_end=True),
    "siglip": Original(tower="siglip"),
    "anyres, flat": Original(aspect="anyres", merge="flat"),
    "anyres, unpad": Original(aspect="anyres", merge="spatial_unpad"),
    "a newline behind each image": Original(text="qwen2", aspect="pad", merge="spatial_unpad"),
    "llava": None,
    "llava_next": None,
    "llava_onevision": None,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_batch_is_what_the_model_reads(kind: str, tmp_path: Path) -> None:
    original = CHECKPOINTS[kind]
    folder = tmp_path / "model"
    path = original.write(folder) if original else write_published(folder, kind)[0]
    raw = tmp_path / "raw"
    save(raw / "1.png", 1, width=31, height=97)
    save(raw / "2.png", 2, width=60, height=40)
    rows = [
        llava_row(1),
        llava_row(
            2, image=["1.png", "2.png"], conversations=say("<image>\n<image>\nWhich?", "Second.")
        ),
        {"id": "text", "conversations": say("Hello", "Hi") + say("More?", "No.")},
    ]
    write_json(raw / "rows.json", rows)
    shards = make_shards(raw, tmp_path / "shards", model=str(path), template="vicuna_v1")
    core = load_model(path, dtype="float32", device="cpu", template="vicuna_v1")
    spec = EncoderSpec(str(path), template="vicuna_v1")
    (batch,) = stream_batches(config_of(shards, grouping="none"), spec)
    assert not batch.dropped
    tensors = batch.to_tensors()
    with torch.inference_mode():
        output = core.model(**tensors)
    assert torch.isfinite(output.loss)
    reader = ShardReader(open_folder(str(shards)), load_manifest(str(shards)).shards[0].name)
    stored = {row.sample.sample_id: row.sample for row in reader.rows()}
    for i, sample_id in enumerate(batch.sample_ids):
        sample = stored[sample_id]
        images = [decode(data, limits=config_of(shards).limits) for data in sample.images]
        text = core.template.render(sample.messages, add_generation_prompt=False)
        alone = core.encode(text, images)
        length = int(batch.arrays["attention_mask"][i].sum())
        assert tensors["input_ids"][i, :length].tolist() == alone["input_ids"][0].tolist()
        with torch.inference_mode():
            expected = core.model(**alone).logits[0]
        torch.testing.assert_close(output.logits[i, :length], expected, rtol=0, atol=1e-4)
        read = core.template.encode(sample.messages, core.tokenizer)
        learned = [label for label in tensors["labels"][i].tolist() if label != IGNORED]
        assert learned == [label for label in read.labels if label != IGNORED]


def test_samples_that_are_too_long_are_dropped_and_recorded(shards: Path) -> None:
    config = config_of(shards, max_length=60)
    (stream,) = stream_all(config, 1)
    batches = list(stream)
    kept = [sample_id for batch in batches for sample_id in batch.sample_ids]
    dropped = [drop for batch in batches for drop in batch.dropped]
    assert max(batch.arrays["input_ids"].shape[1] for batch in batches) <= 60
    assert {drop.reason for drop in dropped} == {"too_long"}
    assert "more than max_length 60" in dropped[0].message
    assert sorted([*kept, *(drop.sample_id for drop in dropped)]) == sorted(
        f"row-{i}" for i in range(NUM_ROWS)
    )


def test_truncation_cuts_text_and_never_an_image(shards: Path) -> None:
    encoder = load_encoder(str(tiny_model()))
    whole = {batch.sample_ids[0]: batch.arrays for batch in single_rows(shards)}
    num_cut = 0
    cut = [
        (max_length, batch)
        for max_length in range(20, 90, 7)
        for batch in single_rows(shards, max_length=max_length, over_long="truncate")
    ]
    for max_length, batch in cut:
        for sample_id in batch.sample_ids:
            ids = batch.arrays["input_ids"][0]
            assert len(ids) <= max_length
            assert ids.tolist() == whole[sample_id]["input_ids"][0, : len(ids)].tolist()
            num_cut += len(ids) < whole[sample_id]["input_ids"].shape[1]
            num_images = len(batch.arrays.get("pixel_values", ()))
            per_image = encoder.count_image_tokens([(9, 9)])[0]
            assert (ids == encoder.image_token_id).sum() == num_images * per_image
            assert (batch.arrays["labels"] != IGNORED).any()
        for drop in batch.dropped:
            assert "has no learned tokens within the first" in drop.message
    assert num_cut > 20


def single_rows(shards: Path, **settings: Any) -> list[Batch]:
    (stream,) = stream_all(config_of(shards, batch_size=1, **settings), 1)
    return list(stream)


@pytest.mark.slow
def test_readers_on_ray_give_the_same_batches_ahead_of_the_trainer(
    cluster: None, shards: Path
) -> None:
    settings = {"num_readers": 2, "reader_cpus": 0.5, "num_ahead": 3}
    (here,) = stream_all(config_of(shards), 1, 2, num_epochs=3)
    (ahead,) = stream_all(config_of(shards, **settings), 1, 2, num_epochs=3)
    expected = list(here)
    for i, batch in enumerate(ahead):
        assert batch.sample_ids == expected[i].sample_ids
        assert batch.resume_at == expected[i].resume_at
        for name, array in expected[i].arrays.items():
            np.testing.assert_array_equal(batch.arrays[name], array)
        if i == 3:
            kill_a_reader()
    assert i == len(expected) - 1


def kill_a_reader() -> None:
    below = psutil.Process().children(recursive=True)
    next(process for process in below if "BatchBuilder" in "".join(process.cmdline())).kill()
