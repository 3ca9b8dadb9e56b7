"""Which checkpoint a run goes on from, whatever happened to its folder; no Ray."""

import json
from pathlib import Path

import pytest

from llava_ray.data.loader.order import Position
from llava_ray.errors import ConfigError
from llava_ray.train.checkpoint import TrainProgress
from llava_ray.train.find_checkpoint import (
    SNAPSHOT,
    describe_kept,
    find_whole_steps,
    is_started,
    prepare_resume,
    remove_unfinished,
)


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "weights.pt").write_bytes(b"12345678")
    progress = TrainProgress(
        step=step,
        position=Position(0, 0, step, 0),
        num_workers=1,
        stage=2,
        method="full",
        loss=None,
        files={"state/weights.pt": 8},
    )
    (folder / "progress.json").write_text(progress.model_dump_json())
    return folder


def write_snapshot(run: Path, *steps: int) -> None:
    entries = [{"checkpoint_dir_name": f"checkpoint-{step}", "metrics": {}} for step in steps]
    content = {
        "ray_version": "2",
        "checkpoint_results": entries,
        "checkpoint_report_indices": list(range(len(steps))),
        "latest_checkpoint_result": entries[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
    }
    (run / SNAPSHOT).write_text(json.dumps(content))


def test_a_checkpoint_cut_short_by_a_full_disk_is_passed_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    (write_checkpoint(tmp_path, 10) / "state" / "weights.pt").write_bytes(b"1234")
    assert find_whole_steps(str(tmp_path)) == [5]
    assert prepare_resume(str(tmp_path)) == 5
    assert "checkpoint-5" in describe_kept(str(tmp_path))
    remove_unfinished(str(tmp_path), 5)
    assert not (tmp_path / "checkpoint-10").exists()


def test_whole_checkpoints_are_never_removed(tmp_path: Path) -> None:
    for step in (5, 10):
        write_checkpoint(tmp_path, step)
    remove_unfinished(str(tmp_path), 0)
    assert find_whole_steps(str(tmp_path)) == [5, 10]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_broken_list_of_ray_is_set_right(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, 5)
    (tmp_path / SNAPSHOT).write_text(content)
    assert prepare_resume(str(tmp_path)) == 5
    assert not (tmp_path / SNAPSHOT).exists()


def test_a_list_that_names_a_removed_checkpoint_is_shortened(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    write_snapshot(tmp_path, 5, 10)
    assert prepare_resume(str(tmp_path)) == 5
    found = json.loads((tmp_path / SNAPSHOT).read_text())
    assert [each["checkpoint_dir_name"] for each in found["checkpoint_results"]] == ["checkpoint-5"]
    assert found["checkpoint_report_indices"] == [0]
    assert found["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoint-5"


def test_the_checkpoint_that_is_named_is_taken_and_later_ones_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step)
    assert prepare_resume(str(tmp_path), "checkpoint-10") == 10
    assert find_whole_steps(str(tmp_path)) == [5, 10]
    assert (tmp_path / "replaced-1-checkpoint-15" / "progress.json").is_file()
    with pytest.raises(ConfigError, match="checkpoint-5, checkpoint-10"):
        prepare_resume(str(tmp_path), "checkpoint-7")


def test_without_a_checkpoint_resuming_is_an_error_that_keeps_the_log(tmp_path: Path) -> None:
    (tmp_path / "train_log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        prepare_resume(str(tmp_path))
    assert (tmp_path / "train_log.jsonl").read_text() == '{"step": 1}\n'
    assert "nothing to resume from" in describe_kept(str(tmp_path))


def test_a_run_that_never_began_does_not_take_the_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: run\n")
    (tmp_path / SNAPSHOT).write_text("{}")
    (tmp_path / "train_log.jsonl").touch()
    assert not is_started(str(tmp_path))
    (tmp_path / "train_log.jsonl").write_text('{"step": 1}\n')
    assert is_started(str(tmp_path))
