"""Folders of raw data and of shards: on this machine's disk or at any address that fsspec knows."""

import hashlib
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llava_ray.errors import ConfigError, MissingPackageError, SampleError


@dataclass(frozen=True)
class Folder:
    """A folder; names in it are relative and have `/` between their parts.

    Attributes:
        files: fsspec's file system.
        root: the folder's path there.
        address: as it was given.
    """

    files: Any
    root: str
    address: str

    def path(self, name: str) -> str:
        """Return where a file is, in the terms of `files`."""
        return f"{self.root}/{name}" if name else self.root

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return self.files.open(self.path(name), "rb")

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        """Return what a file holds, or its first `limit` bytes."""
        return self.files.cat_file(self.path(name), end=limit)

    def has(self, name: str) -> bool:
        """Return whether there is a file or folder of that name."""
        return self.files.exists(self.path(name))

    def list(self, *endings: str) -> list[str]:
        """Return the names of all files below, sorted, that end so and are not hidden."""
        start = len(self.root) + 1
        names = sorted(path[start:] for path in self.files.find(self.root))
        return [n for n in names if n.lower().endswith(endings) and not _is_hidden(n)]

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        with self.write_beside(name) as path, open(path, "wb") as file:
            file.write(data)

    @contextmanager
    def write_beside(self, name: str) -> Iterator[Path]:
        """Give the path of a new file; when the block ends without an error it becomes `name`."""
        if self.is_local:
            scratch = Path(self.path(posixpath.join(posixpath.dirname(name), _new_name())))
            scratch.parent.mkdir(parents=True, exist_ok=True)
        else:
            import tempfile

            scratch = Path(tempfile.gettempdir()) / _new_name()
        try:
            yield scratch
            if self.is_local:
                os.replace(scratch, self.path(name))
            else:  # object stores show a file when all of it is there
                self.files.put_file(str(scratch), self.path(name))
        finally:
            scratch.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that it holds, if it is there."""
        if self.has(name):
            self.files.rm(self.path(name), recursive=True)

    @property
    def is_local(self) -> bool:
        """The folder is on this machine."""
        return "file" in self.files.protocol


def open_folder(address: str) -> Folder:
    """Return the folder at a path or address ("s3://bucket/data"); it need not be there.

    Raises:
        ConfigError: the address is of no known kind.
        MissingPackageError: the package for that kind of address is not installed.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise MissingPackageError(f"{address!r} needs a package: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address of a folder: {error}") from error
    return Folder(files, root.rstrip("/"), address)


def find_input(address: str) -> tuple[Folder, list[str]]:
    """Return a folder of raw data, and the name of the one file that is meant (none: all).

    Raises:
        ConfigError: there is nothing.
    """
    folder = open_folder(address)
    if folder.files.isfile(folder.root):
        parent, _, name = folder.root.rpartition("/")
        return Folder(folder.files, parent, address.rstrip("/").rpartition("/")[0] or "."), [name]
    if not folder.files.isdir(folder.root):
        raise ConfigError(f"there is nothing at {address!r}: give the folder of the raw data")
    return folder, []


def check_name(name: str) -> str:
    """Return the name of an image in its folder, `./` and doubled slashes removed.

    Raises:
        SampleError: it leads out of the folder.
    """
    clean = posixpath.normpath(name)
    parts = clean.replace("\\", "/").split("/")
    leads_out = ".." in parts or clean.startswith(("/", "~")) or ":" in parts[0] or "\0" in name
    if leads_out or clean == ".":
        raise SampleError(
            f"the image {name!r} is not inside the folder of images: name it relative to it",
            reason="image_path",
        )
    return clean


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _new_name() -> str:
    return f".{uuid.uuid4().hex}"


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


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
