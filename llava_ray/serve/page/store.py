"""The folder of the page's uploads: one per process, deleted soon after the process ends.

Gradio deletes old uploads while it runs. The next page that starts on the machine deletes the
folders of pages that were killed or replaced.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "llava-ray-page-"
_LOCK = ".lock"


def make_store(root: Path | None = None) -> str:
    """Create and lock a folder, and delete the folders of processes that no longer run.

    Args:
        root: parent of these folders; by default the system's folder for temporary files.
    """
    root = root or Path(tempfile.gettempdir())
    for lock in root.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):  # locked, or being deleted by another process
            _hold(lock)
            shutil.rmtree(lock.parent)
    new = Path(tempfile.mkdtemp(prefix="llava-ray-new-", dir=root))
    _hold(new / _LOCK)
    return str(new.rename(root / new.name.replace("llava-ray-new-", _PREFIX)))


def _hold(lock: Path) -> None:
    """Lock a file until this process ends; raise an OSError if another process has locked it."""
    file = os.open(lock, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
