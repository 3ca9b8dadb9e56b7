"""Conversion: what ends up in shards and what in rejects, and what a stopped one leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.output import begin_output, open_output
from llava_ray.data.convert.partition import make_shard_jobs
from llava_ray.data.convert.run import convert_dataset
from llava_ray.data.convert.write_shard import ShardJobRunner
from llava_ray.data.loader.encode import load_encoder
from llava_ray.data.manifest import load_index, load_manifest
from llava_ray.data.shards import ShardReader
from llava_ray.data.sources import SOURCES
from llava_ray.errors import ConfigError, SampleError
from llava_ray.images import decode
from llava_ray.storage import check_name, open_folder
from tests.support.raw_data import (
    bad_images,
    convert_here,
    llava_row,
    odd_images,
    read,
    save,
    write_json,
    write_llava,
)
from tests.support.tiny_checkpoint import tiny_model

pytestmark = pytest.mark.ray

JOB = [sys.executable, Path(__file__).parents[2] / "jobs" / "convert.py", "llava"]


def settings(folder: Path, out: Path, **more: Any) -> ConvertConfig:
    fields = {"source": "llava", "input": str(folder), "output": str(out), "rows_per_shard": 4}
    return ConvertConfig.model_validate(fields | {"num_workers": 1} | more)


def read_rejects(out: Path) -> list[dict[str, str]]:
    files = sorted(out.glob("rejects/*"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def read_rows(out: Path):
    folder, manifest = open_folder(str(out)), load_manifest(str(out))
    return [row for shard in manifest.shards for row in ShardReader(folder, shard.name).rows()]


def list_files(folder: Path) -> list[str]:
    found = folder.rglob("*")
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def test_raw_data_becomes_shards_on_ray(cluster: None, tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    rows = json.loads((raw / "data.json").read_text())
    rows.append(llava_row(99))
    write_json(raw / "data.json", rows)
    seen = []
    config = settings(raw, tmp_path / "out", max_rejects="10%")
    manifest = convert_dataset(config, on_progress=seen.append)
    assert (manifest.num_samples, manifest.num_text_only, manifest.num_images) == (10, 2, 9)
    assert manifest.rejects == {"image_missing": 1}
    assert (seen[-1].num_rows, seen[-1].num_samples) == (11, 10)
    assert list_files(tmp_path / "out") == [
        "_index.parquet",
        "_jobs.json",
        "_manifest.json",
        *(f"part-0000{k}.parquet" for k in range(3)),
        "rejects/part-00002.jsonl",
    ]
    assert [row.sample.sample_id for row in read_rows(tmp_path / "out")] == [
        f"row-{number}" for number in range(10)
    ]
    (reject,) = read_rejects(tmp_path / "out")
    assert reject["id"] == "row-99"
    assert reject["where"] == "data.json[10]"
    assert "no image '99.png'" in reject["message"]
    assert convert_dataset(config) == manifest, "a finished one is left as it is"
    convert_here(settings(raw, tmp_path / "again"))
    assert load_manifest(str(tmp_path / "again")).digest == manifest.digest


def test_images_are_stored_as_they_came_with_their_upright_size(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    images = odd_images()
    for name, data in images.items():
        (raw / name).write_bytes(data)
    write_json(raw / "rows.json", [llava_row(i, image=name) for i, name in enumerate(images)])
    convert_here(settings(raw, tmp_path / "out"))
    rows = read_rows(tmp_path / "out")
    assert read_rejects(tmp_path / "out") == []
    stored = dict(zip(images, [row.sample.images[0] for row in rows], strict=True))
    assert stored == images
    sizes = dict(zip(images, [row.image_sizes[0] for row in rows], strict=True))
    assert sizes["plain.jpg"] == (37, 23)
    assert sizes["turned.jpg"] == (23, 37)
    assert sizes["moving.gif"] == (20, 30)
    for name, data in images.items():
        assert decode(data, limits=settings(raw, raw).limits).size == sizes[name]


def test_bad_images_are_rejected_with_the_reason_and_nothing_else_is(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    save(raw / "0.png")
    rows = [llava_row(0)]
    reasons = {"row-1": "image_path", "row-2": "image_missing"}
    rows += [llava_row(1, image="../raw/0.png"), llava_row(2, image="nowhere.png")]
    for name, (data, reason) in bad_images().items():
        (raw / name).write_bytes(data)
        rows.append(llava_row(len(rows), image=name))
        reasons[rows[-1]["id"]] = reason
    (raw / "big.png").write_bytes(bytes(2000))
    rows.append(llava_row(len(rows), image="big.png"))
    reasons[rows[-1]["id"]] = "image_oversized"
    write_json(raw / "rows.json", rows)
    convert_here(settings(raw, tmp_path / "out", limits={"max_image_bytes": 500_000}))
    found = {reject["id"]: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    assert found | {rows[-1]["id"]: "image_oversized"} == reasons
    assert [row.sample.sample_id for row in read_rows(tmp_path / "out")] == ["row-0"]
    manifest = load_manifest(str(tmp_path / "out"))
    assert manifest.num_rejects == len(rows) - 1


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x", "..\\x", "C:/x", "~/x", ""]
)
def test_the_name_of_an_image_stays_inside_its_folder(name: str) -> None:
    with pytest.raises(SampleError, match="is not inside the folder") as raised:
        check_name(name)
    assert raised.value.reason == "image_path"


def test_harmless_names_of_images_are_tidied() -> None:
    assert check_name("./a//b/../c.png") == "a/c.png"
    assert check_name("coco/train2017/0.jpg") == "coco/train2017/0.jpg"


def test_a_shard_holds_what_the_converter_made_of_the_row(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 16)
    convert_here(settings(raw, tmp_path / "out", model=str(tiny_model())))
    rows = json.loads((raw / "data.json").read_text())
    encoder = load_encoder(str(tiny_model()))
    counts = load_index(open_folder(str(tmp_path / "out"))).to_pylist()
    for row, stored, count in zip(rows, read_rows(tmp_path / "out"), counts, strict=True):
        sample = SOURCES["llava"].convert(row)
        assert stored.sample.sample_id == row["id"]
        assert stored.sample.messages == sample.messages
        assert stored.sample.images == tuple((raw / str(n)).read_bytes() for n in sample.images)
        assert encoder.tokenize(stored.sample) == encoder.template.encode(
            sample.messages, encoder.processor.tokenizer
        )
        assert count["num_tokens"] == encoder.count_tokens(sample, stored.image_sizes)
        words = [word for turn in row["conversations"] for word in turn["value"].split()]
        assert count["num_words"] == len(words)
    manifest = load_manifest(str(tmp_path / "out"))
    assert (manifest.source, manifest.model) == ("llava", str(tiny_model()))


def test_samples_with_too_many_tokens_are_rejected(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    config = settings(raw, tmp_path / "out", model=str(tiny_model()), max_tokens=60)
    convert_here(config)
    rejects = read_rejects(tmp_path / "out")
    assert {reject["reason"] for reject in rejects} == {"too_long"}
    index = load_index(open_folder(str(tmp_path / "out"))).to_pylist()
    assert max(row["num_tokens"] for row in index) <= 60
    assert len(index) + len(rejects) == 10


def test_row_groups_are_small_and_text_is_compressed(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 150)
    convert_here(settings(raw, tmp_path / "out", rows_per_shard=1000))
    metadata = pq.ParquetFile(tmp_path / "out" / "part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [64, 64, 22]
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    compression = {column.path_in_schema: column.compression for column in columns}
    assert compression.pop("images.list.element.data") == "UNCOMPRESSED"
    assert set(compression.values()) == {"ZSTD"}


def test_a_stopped_conversion_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 20)
    config = settings(raw, tmp_path / "out")
    runner = ShardJobRunner(config)
    output = open_output(config)
    begin_output(output, config, [])
    for job in list(make_shard_jobs(config))[1:3]:
        runner.run(job)
    (tmp_path / "out" / f".{'0' * 32}").write_text("half of a shard")
    with pytest.raises(
        ConfigError, match=r"no _manifest.json .* run the same command again and it resumes"
    ):
        load_manifest(output)
    written = [tmp_path / "out" / f"part-0000{k}.parquet" for k in (1, 2)]
    before = [path.stat().st_mtime_ns for path in written]
    convert_here(config)
    assert [path.stat().st_mtime_ns for path in written] == before
    convert_here(settings(raw, tmp_path / "whole"))
    assert list_files(tmp_path / "out") == list_files(tmp_path / "whole")
    manifests = [load_manifest(str(tmp_path / name)) for name in ("out", "whole")]
    assert manifests[0] == manifests[1]


def test_what_another_conversion_has_begun_is_not_continued(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 8)
    config = settings(raw, tmp_path / "out")
    begin_output(open_output(config), config, [])
    other = settings(raw, tmp_path / "out", rows_per_shard=5)
    with pytest.raises(ConfigError, match=r"with other settings .rows_per_shard.: choose another"):
        convert_here(other)
    convert_here(settings(raw, tmp_path / "out", rows_per_shard=5, overwrite=True))
    with pytest.raises(ConfigError, match=r"with other settings .rows_per_shard."):
        convert_here(config)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty"):
        convert_here(settings(raw, tmp_path / "home"))


def test_overwriting_removes_shards_and_nothing_else(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 8)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"holds 'letter.txt', which no conversion wrote"):
        convert_here(settings(raw, tmp_path / "home", overwrite=True))
    assert list_files(tmp_path / "home") == ["letter.txt"]


def test_shards_are_written_to_and_read_from_addresses(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 8)
    config = settings(raw, tmp_path).model_copy(update={"output": "memory://shards/set"})
    convert_here(config)
    manifest = load_manifest("memory://shards/set")
    convert_here(settings(raw, tmp_path / "out"))
    assert manifest.digest == load_manifest(str(tmp_path / "out")).digest
    reader = ShardReader(open_folder("memory://shards/set"), manifest.shards[1].name)
    assert reader.read(2).sample.sample_id == "row-6"


@pytest.mark.slow
def test_too_many_rejects_fail_the_conversion_and_say_which(cluster: None, tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 8)
    (raw / "3.png").write_bytes(b"")
    (raw / "5.png").unlink()
    with pytest.raises(ConfigError, match=r"2 of 8 rows were rejected \(1 image_.*max_rejects=1%"):
        convert_dataset(settings(raw, tmp_path / "out"))
    assert len(read_rejects(tmp_path / "out")) == 2
    with pytest.raises(ConfigError, match="no _manifest"):
        load_manifest(str(tmp_path / "out"))
    assert convert_dataset(settings(raw, tmp_path / "out", max_rejects="2")).num_samples == 6
    save(raw / "3.png", 3)
    save(raw / "5.png", 5)
    healed = convert_dataset(settings(raw, tmp_path / "out", max_rejects="0"))
    assert (healed.num_samples, healed.rejects) == (8, {})


def test_a_broken_input_is_told_as_it_is_through_ray(cluster: None, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "rows.json").write_text('[{"id": ')
    with pytest.raises(ConfigError, match=r"^'rows.json' in .* is not JSON"):
        convert_dataset(settings(raw, tmp_path / "out"))


def test_the_command_says_what_came_out(cluster: None, tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 6)
    (raw / "3.png").write_bytes(b"")
    words = ["--input", raw, "--output", tmp_path / "out", "--num-workers", "1"]
    done = run_job(*words, "--max-rejects", "20%")
    assert done.returncode == 0, done.stderr
    assert "5 samples with 4 images in 1 shards, 1 of text alone; 1 rows rejected" in done.stdout
    assert "1  image_empty" in done.stdout
    noise = [line for line in done.stderr.splitlines() if line.strip() and " rows " not in line]
    assert noise == [], "only the progress; nothing of Ray's"


def test_rows_that_come_with_their_images_end_a_part_before_it_grows_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_ray.data.convert import partition
    from tests.support.raw_data import write_table

    held = {"bytes": save(tmp_path / "x.png"), "path": None}
    rows = [{"id": f"{i}", "image": held, "caption": f"number {i}"} for i in range(6)]
    write_table(tmp_path / "hub" / "x.parquet", rows)
    monkeypatch.setattr(partition, "MAX_INLINE_IMAGE_BYTES", 2 * len(held["bytes"]))
    config = settings(tmp_path / "hub", tmp_path / "out", source="hf")
    assert [len(job.rows) for job in make_shard_jobs(config)] == [2, 2, 2]
    assert len(read("hf", tmp_path / "hub")) == 6


@pytest.mark.slow
def test_a_conversion_that_was_killed_leaves_nothing_half_and_goes_on(
    cluster: None, tmp_path: Path
) -> None:
    raw = write_llava(tmp_path / "raw", 400)
    out = tmp_path / "out"
    words = ["--input", raw, "--output", out, "--num-workers", "1", "--rows-per-shard", "8"]
    running = subprocess.Popen(  # with a Ray of its own, which is killed too
        [*JOB, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for_shards(out, running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (out / "_manifest.json").exists()
    finished = sorted(out.glob("part-*.parquet"))
    for path in finished:
        pq.ParquetFile(path).close()
    assert 3 <= len(finished) < 50
    done = run_job(*words)
    assert done.returncode == 0, done.stderr
    convert_here(settings(raw, tmp_path / "whole", rows_per_shard=8))
    assert load_manifest(str(out)).digest == load_manifest(str(tmp_path / "whole")).digest
    assert list_files(out) == list_files(tmp_path / "whole")


def run_job(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Convert by the script, on the cluster of the tests."""
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.run([*JOB, *words], env=environment, capture_output=True, text=True)


def wait_for_shards(out: Path, running: subprocess.Popen[bytes]) -> None:
    while len(list(out.glob("_progress/0*.json"))) < 3:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
