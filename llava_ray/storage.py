"""All access to fsspec: folders on this machine's disk or at any address that fsspec supports.

open_folder   a `Folder` to read and write files in, wherever it is (raw data, shards, runs)
fetch_folder  a copy of a remote folder in the local cache (checkpoints)
"""

import errno
import hashlib
import os
import posixpath
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from llava_ray.errors import ConfigError, DiskFullError, MissingPackageError, SampleError

_VERSION_KEYS = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "created")
"""Keys of a listing whose values change with the file; each file system has some of them."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Folder:
    """A folder. Names of files in it are relative and use `/`.

    Attributes:
        files: fsspec's file system.
        root: the folder's path in that file system.
        address: the path or address that the caller gave.
        confines: resolved paths of folders and files. Only regular files inside them can be read,
            so that no link, pipe or device in somebody else's data is followed. Empty: no limit.
    """

    files: Any
    root: str
    address: str
    confines: tuple[str, ...] = ()

    def path(self, name: str) -> str:
        """Return a file's path in the file system."""
        return f"{self.root}/{name}" if name else self.root

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading.

        Raises:
            OSError: it cannot be read.
            SampleError: the folder is confined, and the file is not one inside it.
        """
        self._check_confined(name)
        return self.files.open(self.path(name), "rb")

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        """Return a file's content, or its first `limit` bytes; raises what `open` raises."""
        self._check_confined(name)
        return self.files.cat_file(self.path(name), end=limit)

    def describe_version(self, name: str) -> str | None:
        """Return a text that changes with a file: size, times, checksum; None if it is missing.

        On this machine's disk it also changes when the same bytes are written again.
        """
        try:
            if self.is_local:
                facts = os.stat(self.path(name))
                return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
            entry = self.files.info(self.path(name))
        except (OSError, ValueError):
            return None
        return repr([(key, str(entry[key])) for key in ("size", *_VERSION_KEYS) if key in entry])

    def has(self, name: str) -> bool:
        """Return whether there is a file or folder of that name."""
        return self.files.exists(self.path(name))

    def list(self, *endings: str) -> list[str]:
        """Return the sorted names of all files in and below the folder with one of the endings.

        Hidden files are left out.
        """
        start = len(self.root) + 1
        names = sorted(path[start:] for path in self.files.find(self.root))
        return [n for n in names if n.lower().endswith(endings) and not _is_hidden(n)]

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        with self.write_beside(name, num_bytes=len(data)) as path, open(path, "wb") as file:
            file.write(data)

    @contextmanager
    def write_beside(self, name: str, *, num_bytes: int = 0) -> Iterator[Path]:
        """Yield the path of a scratch file, which becomes `name` if the block ends without error.

        Args:
            name: the file's name.
            num_bytes: its approximate size, for the error message.

        Raises:
            DiskFullError: there is no space for it.
        """
        if self.is_local:
            scratch = Path(self.path(posixpath.join(posixpath.dirname(name), _new_name())))
        else:
            scratch = Path(tempfile.gettempdir()) / _new_name()
        try:
            scratch.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            if self.is_local:
                os.replace(scratch, self.path(name))
            else:  # object stores show a file only once it is complete
                self.files.put_file(str(scratch), self.path(name))
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise DiskFullError(_explain_full(scratch, name, num_bytes)) from error
        finally:
            scratch.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything in it, if it is there."""
        if self.has(name):
            self.files.rm(self.path(name), recursive=True)

    def send(self, source: Path) -> None:
        """Copy all files below a local folder into this one, replacing those of the same name."""
        for path in sorted(source.rglob("*")):
            if path.is_file():
                target = self.path(path.relative_to(source).as_posix())
                self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.files.put_file(str(path), target)

    def confine(self) -> "Folder":
        """Return this folder, from which only files inside it can be read."""
        if not self.is_local:
            return self
        root = os.path.realpath(self.root)
        return replace(self, confines=(_find_hub_cache(root) or root,))

    def measure(self, name: str) -> int:
        """Return a file's size in bytes, 0 if it is missing."""
        try:
            return self.files.size(self.path(name)) or 0
        except (OSError, ValueError):
            return 0

    def _check_confined(self, name: str) -> None:
        if not self.confines:
            return
        path = os.path.realpath(self.path(name))
        if not any(is_below(path, confine) for confine in self.confines):
            raise SampleError(
                f"{name[:200]!r} is a link out of the folder {self.address!r}: copy the file there",
                reason="image_path",
            )
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise SampleError(
                f"{name[:200]!r} is a pipe or a device, not a file: remove it", reason="image_path"
            )

    @property
    def is_local(self) -> bool:
        """Whether the folder is on this machine's disk."""
        return "file" in self.files.protocol


def is_below(path: str, folder: str) -> bool:
    """Return whether a path is a folder itself or inside it; both are absolute."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def is_address(path: str) -> bool:
    """Return whether a text is an address ("s3://bucket/data") and not a path on a disk."""
    return "://" in path


def open_folder(address: str) -> Folder:
    """Return the folder at a path or address ("s3://bucket/data"), which need not exist yet.

    Credentials are found by the package for that kind of address, as usual for it.

    Raises:
        ConfigError: fsspec does not support this kind of address.
        MissingPackageError: the package for this kind of address is not installed.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise MissingPackageError(f"{address!r} needs a package: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{address!r} is not the address of a folder: {error}") from error
    return Folder(files, root.rstrip("/"), address)


def find_input(address: str) -> tuple[Folder, list[str]]:
    """Return a folder of raw data, and a list with the file's name if `address` is a file's.

    The folder is confined; see `Folder`.

    Raises:
        ConfigError: there is nothing at that address.
    """
    folder = open_folder(address)
    if folder.files.isfile(folder.root):
        parent, _, name = folder.root.rpartition("/")
        shown = address.rstrip("/").rpartition("/")[0] or "."
        around = Folder(folder.files, parent, shown).confine()
        if not around.is_local:
            return around, [name]
        named = os.path.realpath(folder.root)  # the user may name a link
        return replace(around, confines=(*around.confines, named)), [name]
    if not folder.files.isdir(folder.root):
        raise ConfigError(f"there is nothing at {address!r}: give the folder of the raw data")
    return folder.confine(), []


def check_name(name: str) -> str:
    """Return an image's path in its folder, without `./` and repeated slashes.

    Raises:
        SampleError: the name points outside the folder.
    """
    clean = posixpath.normpath(name)
    parts = clean.replace("\\", "/").split("/")
    leads_out = ".." in parts or clean.startswith(("/", "~")) or ":" in parts[0] or "\0" in name
    if leads_out or clean == ".":
        raise SampleError(
            f"the image {name[:200]!r} is not inside the folder of images: give its path relative "
            "to that folder",
            reason="image_path",
        )
    return clean


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_folder(address: str) -> Path:
    """Return a local copy of the folder at an address, from the cache if it is there.

    It is copied again when the size, time or checksum of a file has changed. Subfolders are not
    copied.

    Raises:
        ConfigError: there is no such folder, or it cannot be read.
        MissingPackageError: the package for this kind of address is not installed.
    """
    remote = open_folder(address.rstrip("/"))
    entries = _list_entries(remote, address)
    facts = [
        (e["name"], e.get("size"), *(str(e[key]) for key in _VERSION_KEYS if key in e))
        for e in entries
    ]
    digest = hashlib.sha256(repr((address, facts)).encode()).hexdigest()[:24]
    folder = find_cache("checkpoints") / digest
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{digest}-"))
    try:
        for entry in entries:
            name = entry["name"].rpartition("/")[2]
            remote.files.get_file(entry["name"], str(scratch / name))
        os.replace(scratch, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process has copied it in the meantime
            raise ConfigError(
                f"{address!r} could not be copied to {folder}: {error}; check the connection and "
                "the free disk space"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def find_cache(kind: str) -> Path:
    """Return the cache folder for one kind of file; it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llava_ray" / kind


def _list_entries(remote: Folder, address: str) -> list[dict[str, Any]]:
    """Return fsspec's entries of the files directly in a folder, sorted by name."""
    try:
        found = remote.files.ls(remote.root, detail=True)
    except OSError as error:
        raise ConfigError(
            f"there is no folder at {address!r}, or it cannot be read ({error}): check the address "
            "and the credentials"
        ) from error
    entries = sorted((e for e in found if e["type"] == "file"), key=lambda entry: entry["name"])
    if not entries:
        raise ConfigError(f"there are no files at {address!r}: give the folder of a checkpoint")
    return entries


def _find_hub_cache(root: str) -> str | None:
    """Return the folder of a repository in Hugging Face's cache that a path is in.

    There, the files of a snapshot are links to `blobs` beside it.
    """
    before, found, _ = f"{root}/".rpartition("/snapshots/")
    return before if found and os.path.isdir(f"{before}/blobs") else None


def _explain_full(scratch: Path, name: str, num_bytes: int) -> str:
    written = scratch.stat().st_size if scratch.exists() else 0
    needed = f"about {num_bytes:,}" if num_bytes >= written else f"more than {written:,}"
    try:
        free = shutil.disk_usage(scratch.parent).free + written
    except OSError:
        free = written
    return (
        f"the disk of {str(scratch.parent)!r} is full: {name!r} takes {needed} bytes, and {free:,} "
        "are free; free some space and run the same command again, which goes on from here"
    )


def _new_name() -> str:
    return f".{uuid.uuid4().hex}"


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
