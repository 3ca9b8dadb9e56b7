"""The same conversion once more: it repeats what has changed, and nothing else."""

import errno
import gc
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.output import open_output
from llava_ray.data.convert.partition import make_shard_jobs
from llava_ray.data.convert.records import ShardJob
from llava_ray.data.convert.write_shard import ShardJobRunner, run_shard_job
from llava_ray.data.manifest import load_manifest
from llava_ray.data.shards import ShardReader
from llava_ray.errors import ConfigError, DiskFullError
from llava_ray.storage import open_folder
from tests.support.raw_data import (
    convert_here,
    llava_row,
    save,
    write_json,
    write_llava,
    write_table,
    write_tar,
)
from tests.support.tiny_checkpoint import tiny_model


def configure(folder: Path, out: Path, **more: Any) -> ConvertConfig:
    fields = {"source": "llava", "input": str(folder), "output": str(out), "rows_per_shard": 4}
    return ConvertConfig.model_validate(fields | more)


def read_samples(out: Path):
    folder, manifest = open_folder(str(out)), load_manifest(str(out))
    rows = [row for s in manifest.shards for row in ShardReader(folder, s.name).rows()]
    return {row.sample.sample_id: row.sample for row in rows}


def check_as_new(config: ConvertConfig, tmp_path: Path) -> None:
    """Check that the output is what a conversion into an empty folder gives, file by file."""
    new = config.model_copy(update={"output": str(tmp_path / "new")})
    convert_here(new)
    manifests = [load_manifest(c.output) for c in (config, new)]
    assert manifests[0] == manifests[1]
    names = [
        sorted(p.relative_to(c.output).as_posix() for p in Path(c.output).rglob("*"))
        for c in (config, new)
    ]
    assert names[0] == names[1]


def test_nothing_is_repeated_where_nothing_has_changed(tmp_path: Path) -> None:
    config = configure(write_llava(tmp_path / "raw", 10), tmp_path / "out")
    assert convert_here(config) == [0, 1, 2]
    manifest = load_manifest(config.output)
    assert convert_here(config) == []
    assert load_manifest(config.output) == manifest


def test_a_corrected_label_of_equal_length_is_converted_again(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    config = configure(raw, tmp_path / "out")
    convert_here(config)
    state = (raw / "data.json").stat()
    text = (raw / "data.json").read_text()
    (raw / "data.json").write_text(text.replace("It is 5.", "It is 6."))
    os.utime(raw / "data.json", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert convert_here(config) == [1]
    assert read_samples(tmp_path / "out")["row-5"].messages[1].parts[0].text == "It is 6."  # type: ignore[union-attr]
    check_as_new(config, tmp_path)


def test_a_replaced_image_of_equal_size_is_converted_again(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    for name in ("3.bmp", "8.bmp"):
        save(raw / name, 1, width=8, height=8)
    rows = json.loads((raw / "data.json").read_text())
    for number in (3, 8):
        rows[number]["image"] = f"{number}.bmp"
    write_json(raw / "data.json", rows)
    config = configure(raw, tmp_path / "out")
    convert_here(config)
    state = (raw / "8.bmp").stat()
    replaced = save(raw / "8.bmp", 2, width=8, height=8)
    os.utime(raw / "8.bmp", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (raw / "8.bmp").stat().st_size == state.st_size
    assert convert_here(config) == [2]
    assert read_samples(tmp_path / "out")["row-8"].images == (replaced,)
    check_as_new(config, tmp_path)


def test_an_image_that_was_missing_heals_its_row(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    (raw / "6.png").rename(tmp_path / "6.png")
    (raw / "1.png").write_bytes(b"half an image")
    config = configure(raw, tmp_path / "out")
    convert_here(config)
    assert load_manifest(config.output).rejects == {"image_corrupt": 1, "image_missing": 1}
    assert convert_here(config) == [], "nothing has changed yet"
    (tmp_path / "6.png").rename(raw / "6.png")
    save(raw / "1.png", 1)
    assert convert_here(config) == [0, 1]
    manifest = load_manifest(config.output)
    assert (manifest.num_samples, manifest.rejects) == (10, {})
    assert not list((tmp_path / "out").rglob("rejects/*.jsonl"))
    check_as_new(config, tmp_path)


def test_an_image_that_could_not_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    config = configure(raw, tmp_path / "out")
    with monkeypatch.context() as patch:
        fail_to_read(patch, "6.png")
        convert_here(config)
    assert load_manifest(config.output).rejects == {"image_unreadable": 1}
    assert convert_here(config) == [1]
    assert load_manifest(config.output).rejects == {}


def test_images_that_are_links_out_of_their_folder_or_pipes_are_rejected(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 4)
    (raw / "1.png").rename(tmp_path / "outside.png")
    (raw / "1.png").symlink_to(tmp_path / "outside.png")
    (raw / "2.png").unlink()
    os.mkfifo(raw / "2.png")
    save(raw / "folder" / "real.png", 3)
    (raw / "3.png").unlink()
    (raw / "3.png").symlink_to("folder/real.png")
    for images in (None, str(raw)):
        config = configure(raw / "data.json", tmp_path / f"out{images is None}", images=images)
        convert_here(config)
        assert load_manifest(config.output).rejects == {"image_path": 2}
        assert list(read_samples(Path(config.output))) == ["row-0", "row-3"]


def fail_to_read(patch: pytest.MonkeyPatch, ending: str) -> None:
    from fsspec.implementations.local import LocalFileSystem

    read_file = LocalFileSystem.cat_file

    def cat_file(self: Any, path: str, **kwargs: Any) -> Any:
        if path.endswith(ending):
            raise OSError(errno.EIO, "Input/output error")
        return read_file(self, path, **kwargs)

    patch.setattr(LocalFileSystem, "cat_file", cat_file)


def test_another_tokenizer_at_the_same_path_counts_again(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model(), model)
    config = configure(write_llava(tmp_path / "raw", 6), tmp_path / "out", model=str(model))
    assert convert_here(config) == [0, 1]
    assert convert_here(config) == []
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "note": "another"}))
    assert convert_here(config) == [0, 1]


def test_rows_that_were_taken_away_leave_no_shard_behind(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    config = configure(raw, tmp_path / "out")
    convert_here(config)
    rows = json.loads((raw / "data.json").read_text())
    write_json(raw / "data.json", rows[:5])
    assert convert_here(config) == [1]
    assert len(read_samples(tmp_path / "out")) == 5
    check_as_new(config, tmp_path)
    write_json(raw / "data.json", [*rows, llava_row(0, id="more")])
    assert convert_here(config) == [1, 2]
    assert len(read_samples(tmp_path / "out")) == 11


def test_a_stopped_repetition_is_no_data_set_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    config = configure(raw, tmp_path / "out")
    convert_here(config)
    (raw / "9.png").write_bytes(save(tmp_path / "other.png", 50))
    write_json(raw / "data.json", [*json.loads((raw / "data.json").read_text()), llava_row(0)])

    with monkeypatch.context() as patch:
        patch.setattr("tests.support.raw_data.write_num_jobs", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_here(config)
    with pytest.raises(ConfigError, match="run the same command again and it resumes"):
        load_manifest(config.output)
    assert convert_here(config) == []
    check_as_new(config, tmp_path)


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_shard_that_was_removed_or_cut_is_written_again(tmp_path: Path) -> None:
    config = configure(write_llava(tmp_path / "raw", 10), tmp_path / "out")
    convert_here(config)
    (tmp_path / "out" / "part-00000.parquet").unlink()
    (tmp_path / "out" / "part-00002.parquet").write_bytes(b"PAR1")
    assert convert_here(config) == [0, 2]
    check_as_new(config, tmp_path)


@pytest.mark.parametrize("source", ["hf", "webdataset", "pairs"])
def test_images_inside_tables_and_archives_are_known_by_content(
    source: str, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    config = configure(raw, tmp_path / "out", source=source)
    for seed, expected in ((1, [0]), (1, []), (2, [0])):
        data = save(tmp_path / "x.bmp", seed, width=8, height=8)
        if source == "hf":
            write_table(raw / "x.parquet", [{"image": {"bytes": data}, "caption": "a"}])
        elif source == "webdataset":
            write_tar(raw / "x.tar", {"a.bmp": data, "a.txt": b"a"})
        elif expected:
            save(raw / "a.bmp", seed, width=8, height=8)
            (raw / "a.txt").write_text("a")
        assert convert_here(config) == expected
        assert [sample.images for sample in read_samples(tmp_path / "out").values()] == [(data,)]


def test_output_inside_the_input_and_input_inside_the_output_are_refused(tmp_path: Path) -> None:
    raw = write_llava(tmp_path / "raw", 4)
    (tmp_path / "link").symlink_to(raw)
    for out in (raw, raw / "out", raw / "a" / "b", tmp_path / "link" / "out"):
        with pytest.raises(ConfigError, match=r"is inside the input .*: choose a folder beside"):
            open_output(configure(raw, out))
    for out in (tmp_path, raw):
        with pytest.raises(ConfigError, match=r"the input .* is inside the output"):
            open_output(configure(raw / "data.json", out))
    config = configure(raw, tmp_path / "out", images=str(tmp_path / "out" / "images"))
    with pytest.raises(ConfigError, match=r"the images .* is inside the output"):
        open_output(config)
    config = configure(raw, raw / "out", overwrite=True)
    with pytest.raises(ConfigError, match="is inside the input"):
        open_output(config)
    convert_here(configure(raw / "data.json", raw / "out"))  # only that file is read


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_what_is_needed_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_llava(tmp_path / "raw", 10)
    config = configure(raw, tmp_path / "out")
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        with pytest.raises(DiskFullError) as raised:
            convert_here(config)
    gc.collect()  # pyarrow must not try to finish the file now, which would be a warning
    num_bytes = sum(len((raw / f"{i}.png").read_bytes()) for i in range(4))
    assert f"'part-00000.parquet' takes about {num_bytes // 1000}," in raised.value.message
    assert "are free; free some space and run the same command again" in raised.value.message
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["settings.json"]
    assert convert_here(config) == [0, 1, 2]
    check_as_new(config, tmp_path)


def fill_the_disk(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FULL

    patch.setattr(pq.ParquetWriter, "write_table", fail)
    patch.setattr(pq.ParquetWriter, "close", fail)


def test_a_disk_that_fills_at_a_record_loses_only_that_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(write_llava(tmp_path / "raw", 10), tmp_path / "out")
    open_folder(config.output).files.makedirs(config.output)
    runner = ShardJobRunner(config)
    jobs = list(make_shard_jobs(config))
    with monkeypatch.context() as patch:
        replace, names = os.replace, []

        def fail(source: str, target: str) -> None:
            names.append(target)
            if len(names) == 4:  # a shard and a record a job
                raise FULL
            replace(source, target)

        patch.setattr(os, "replace", fail)
        runner.run(jobs[0])
        with pytest.raises(DiskFullError, match=r"'_progress/00001.json' takes about \d+ bytes"):
            runner.run(jobs[1])
    assert sorted(p.name for p in (tmp_path / "out" / "_progress").iterdir()) == ["00000.json"]


def test_errors_pass_through_ray_as_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(write_llava(tmp_path / "raw", 4), tmp_path / "out")
    open_folder(config.output).files.makedirs(config.output)
    (job,) = make_shard_jobs(config)
    for error, message in (
        (FULL, "the disk of .* is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", raise_error(error))
            found = run_job(job, config)
        assert isinstance(found, DiskFullError | ConfigError)
        assert re.search(message, found.message)
    assert run_job(ConfigError("as it is"), config).message == "as it is"


def run_job(job: ShardJob | ConfigError, config: ConvertConfig) -> Any:
    return pickle.loads(run_shard_job({"job": pickle.dumps(job)}, config, "run")["result"])


def raise_error(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail
