"""Which checkpoints of a run are whole, so that it can go on from the newest of them.

Used by `launch` before a run, and by `worker` whenever workers start. Ray's own list of checkpoints
(`checkpoint_manager_snapshot.json`) is corrected to what is in the folder, because Ray refuses a
list that is empty or names a checkpoint that was removed.
"""

import json
from typing import Any

from pydantic import ValidationError

from llava_ray.errors import ConfigError
from llava_ray.storage import Folder, open_folder
from llava_ray.train.checkpoint import PROGRESS, STATE, TrainProgress
from llava_ray.train.log import LOG

SNAPSHOT = "checkpoint_manager_snapshot.json"
_PREFIX = "checkpoint-"


def find_whole_steps(address: str) -> list[int]:
    """Return the steps of a run's whole checkpoints, in order."""
    folder = open_folder(address)
    return [step for step in _find_steps(folder) if _is_whole(folder, f"{_PREFIX}{step}")]


def describe_kept(address: str) -> str:
    """Return what can be resumed from, as the end of a message."""
    steps = find_whole_steps(address)
    if not steps:
        return f"no checkpoint was saved in {address}, so there is nothing to resume from"
    return (
        f"{_PREFIX}{steps[-1]} in {address} is whole, and the same command with --resume goes on "
        "from it"
    )


def is_started(address: str) -> bool:
    """Whether a run took a step: its folder has a line in its log, or a checkpoint."""
    folder = open_folder(address)
    return bool(folder.measure(LOG) or _find_steps(folder))


def prepare_resume(address: str, named: str | None = None) -> int:
    """Make a run's folder ready to go on, and return the step that it goes on from.

    Args:
        address: The run's folder.
        named: The checkpoint to go on from; whole ones after it are renamed, never removed.
            Default: the newest whole one.

    Raises:
        ConfigError: There is no such checkpoint, or none that is whole. Nothing was changed.
    """
    folder, steps = open_folder(address), find_whole_steps(address)
    if not steps:
        raise ConfigError(
            f"{address!r} has no whole checkpoint to resume from; its log and files are left as "
            "they are: start again under another name=, or remove the folder"
        )
    if named is None:
        step = steps[-1]
    else:
        names = [f"{_PREFIX}{step}" for step in steps]
        if named not in names:
            raise ConfigError(
                f"{named!r} is no whole checkpoint of {address!r}: these are, {', '.join(names)}"
            )
        step = steps[names.index(named)]
        for later in steps[names.index(named) + 1 :]:
            _set_aside(folder, f"{_PREFIX}{later}")
    _correct_snapshot(folder, {f"{_PREFIX}{each}" for each in steps if each <= step})
    return step


def prepare_start(address: str) -> None:
    """Remove what Ray left of a run that never began."""
    open_folder(address).remove(SNAPSHOT)


def remove_unfinished(address: str, step: int) -> None:
    """Remove checkpoints after `step` that were left incomplete, as when a worker died."""
    folder = open_folder(address)
    for later in _find_steps(folder):
        if later > step and not _is_whole(folder, f"{_PREFIX}{later}"):
            folder.remove(f"{_PREFIX}{later}")


def _find_steps(folder: Folder) -> list[int]:
    names = {name.split("/")[0] for name in folder.list("")}
    numbers = [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _is_whole(folder: Folder, name: str) -> bool:
    try:
        progress = TrainProgress.model_validate_json(folder.read(f"{name}/{PROGRESS}"))
    except (OSError, ValidationError):
        return False
    if not progress.files:  # written before sizes were kept
        return folder.has(f"{name}/{STATE}")
    return all(folder.measure(f"{name}/{file}") == size for file, size in progress.files.items())


def _set_aside(folder: Folder, name: str) -> None:
    number = 1
    while folder.has(target := f"replaced-{number}-{name}"):
        number += 1
    folder.files.mv(folder.path(name), folder.path(target), recursive=True)


def _correct_snapshot(folder: Folder, whole: set[str]) -> None:
    try:
        found: dict[str, Any] = json.loads(folder.read(SNAPSHOT))
        pairs = zip(found["checkpoint_results"], found["checkpoint_report_indices"], strict=True)
        kept = [(each, i) for each, i in pairs if each["checkpoint_dir_name"] in whole]
        waiting = [
            pair
            for pair in zip(
                found["pending_training_results"], found["pending_validation_specs"], strict=True
            )
            if pair[0]["checkpoint_dir_name"] in whole
        ]
    except (OSError, ValueError, KeyError, TypeError):
        kept, waiting, found = [], [], {}
    if not kept:
        folder.remove(SNAPSHOT)
        return
    found["checkpoint_results"] = [each for each, _ in kept]
    found["checkpoint_report_indices"] = [i for _, i in kept]
    found["pending_training_results"] = [each for each, _ in waiting]
    found["pending_validation_specs"] = [spec for _, spec in waiting]
    latest = found.get("latest_checkpoint_result") or {}
    if latest.get("checkpoint_dir_name") not in whole:
        found["latest_checkpoint_result"] = max(kept, key=lambda pair: pair[1])[0]
    folder.write(SNAPSHOT, json.dumps(found).encode())
