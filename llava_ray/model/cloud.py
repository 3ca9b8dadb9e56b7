"""Checkpoints in a cloud: a folder at any address that fsspec knows, copied here once.

The copy is kept under a name made from the address and from what lies there (names, sizes, times),
so that a checkpoint that was replaced is fetched again and one that was not is not.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from llava_ray.errors import ConfigError, MissingPackageError

_CHANGES = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "created")
"""What file systems call the facts that change when a file does."""


def fetch_folder(address: str) -> Path:
    """Copy the folder at an address into the cache, unless it is there; return the copy.

    Args:
        address: "s3://bucket/checkpoint", "gs://...", "file:///...", whatever fsspec reads;
            credentials come from where that cloud's package looks for them.

    Raises:
        ConfigError: there is no such folder, or it cannot be read.
        MissingPackageError: the package for that cloud is not installed.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(address.rstrip("/"))
    except ImportError as error:
        raise MissingPackageError(f"{address!r} needs a package: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address of a folder: {error}") from error
    try:
        entries = sorted(
            (entry for entry in files.ls(root, detail=True) if entry["type"] == "file"),
            key=lambda entry: entry["name"],
        )
    except OSError as error:
        raise ConfigError(
            f"there is no folder at {address!r}, or it cannot be read ({error}): check the address "
            "and the credentials"
        ) from error
    if not entries:
        raise ConfigError(f"there are no files at {address!r}: give the folder of a checkpoint")
    facts = [
        (e["name"], e.get("size"), *(str(e[key]) for key in _CHANGES if key in e)) for e in entries
    ]
    digest = hashlib.sha256(repr((address, facts)).encode()).hexdigest()[:24]
    folder = find_cache("checkpoints") / digest
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{digest}-"))
    try:
        for entry in entries:
            files.get_file(entry["name"], str(beside / entry["name"].rpartition("/")[2]))
        os.replace(beside, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, and its copy is as good
            raise ConfigError(
                f"{address!r} could not be copied to {folder}: {error}; check the connection and "
                "the space on the disk"
            ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def find_cache(kind: str) -> Path:
    """Return where this project keeps copies of a kind; the folder may not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llava_ray" / kind
