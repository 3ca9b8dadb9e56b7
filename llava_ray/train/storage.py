"""The folder of a run: on a disk that all machines see, or at an address (s3://bucket/outputs).

At an address the log and what else the first worker writes lies in a local folder meanwhile, and is
sent with every checkpoint. Checkpoints themselves are Ray's to store.
"""

import tempfile
from pathlib import Path

from llava_ray.data.files import open_folder

FILES = ("config.yaml", "train_log.jsonl")
"""What a run goes on with, beside its checkpoints."""


def is_address(path: str) -> bool:
    """Whether a run is kept elsewhere than on a disk."""
    return "://" in path


def open_home(address: str) -> Path:
    """Return the folder to write in: the run's own, or a local one with what is at its address."""
    if not is_address(address):
        home = Path(address)
        home.mkdir(parents=True, exist_ok=True)
        return home
    home, folder = Path(tempfile.mkdtemp(prefix="llava-ray-run-")), open_folder(address)
    for name in FILES:
        if folder.has(name):
            (home / name).write_bytes(folder.read(name))
    return home


def send_home(home: Path, address: str) -> None:
    """Send what was written to the run's address; nothing is to be done on a disk."""
    if not is_address(address):
        return
    folder = open_folder(address)
    for path in sorted(home.rglob("*")):
        if path.is_file():
            target = folder.path(path.relative_to(home).as_posix())
            folder.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            folder.files.put_file(str(path), target)


def is_begun(address: str) -> bool:
    """Whether a run has written anything there."""
    return bool(open_folder(address).list(""))


def remove_unfinished(address: str, step: int) -> None:
    """Remove checkpoints behind the one to go on from: their workers died while they wrote them."""
    folder = open_folder(address)
    names = {name.split("/")[0] for name in folder.list("")}
    for name in names:
        number = name.removeprefix("checkpoint-")
        if name != number and number.isdecimal() and int(number) > step:
            folder.remove(name)
