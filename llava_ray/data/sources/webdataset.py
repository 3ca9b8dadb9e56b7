"""WebDataset: tar files, in which files that share a name belong together.

`0001.jpg`, and `0001.txt` (a caption) or `0001.json` (a row in any form that `conversations`
knows). An archive is read as a stream; what it says about its sizes is checked before anything of
that size is read, so a small archive that unpacks to a large one cannot fill the memory.
"""

import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from tarfile import HeaderError, ReadError
from typing import IO, TYPE_CHECKING

from llava_ray.data.sources.building import RawRow, Row, read_dict
from llava_ray.data.sources.conversations import convert_row
from llava_ray.data.sources.pairs import ENDINGS
from llava_ray.data.sources.readers import MAX_TEXT_BYTES, decode_text
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import Folder
from llava_ray.types import Sample

if TYPE_CHECKING:
    from llava_ray.config import ConvertConfig

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_MAX_JSON_BYTES = 16 << 20
_MAX_HEADER_BYTES = 1 << 20
"""Largest header with a long name or other properties of a file."""
_BROKEN_ARCHIVE = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError, ValueError)


def read_webdataset(folder: Folder, names: list[str], config: "ConvertConfig") -> Iterator[RawRow]:
    """Yield a row for each group of files in each tar, with its images as bytes."""
    files = [name for name in names if name.endswith(_TAR_ENDINGS)]
    if not files:
        raise ConfigError(
            f"there is no .tar in {folder.address!r}: give the folder that holds them"
        )
    for name in files:
        with folder.open(name) as file:
            yield from _read_archive(file, name, config)


def convert_webdataset(row: Row) -> Sample:
    """Return the sample of a group of files."""
    content: Row = {}
    if "json" in row:
        text = decode_text(row["json"], "the .json file")
        content = read_dict(json.loads(text, strict=False), "the .json file")
    if "txt" in row:
        content.setdefault("text", decode_text(row["txt"], "the .txt file"))
    if not content:
        raise SampleError("there is neither a .txt nor a .json file: add one", reason="bad_row")
    content["id"] = row["id"]
    return convert_row(content, "webdataset", images=row["images"] or None)


class _Header(tarfile.TarInfo):
    """The header of a file in an archive: bounded in size, and an error where it is damaged.

    tarfile itself takes a damaged header for the end of the archive, and the rest would be lost.
    """

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ in ("EOFHeaderError", "EmptyHeaderError"):
                raise  # the end of the archive
            raise ReadError(f"a header is damaged: {error}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTRA_HEADERS and self.size > _MAX_HEADER_BYTES:
            raise ReadError(f"a header says that it has {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


_EXTRA_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Group:
    """The files of one row; why the row is rejected, once something is wrong with one of them."""

    def __init__(self, place: str, sample_id: str) -> None:
        self.place = place
        self._row: Row = {"id": sample_id, "images": []}
        self._problem: SampleError | None = None

    def add(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str, limit: int
    ) -> None:
        """Read a file of at most `limit` bytes into the row."""
        if not member.isfile():
            self._reject(f"{member.name!r} is a link or a device, not a file", "image_path")
        elif ending in self._row:
            self._reject(f"there are two files {member.name!r}", "bad_row")
        elif member.size > limit:
            reason = "image_oversized" if f".{ending}" in ENDINGS else "too_long"
            self._reject(
                f"{member.name!r} has {member.size:,} bytes, more than the {limit:,} allowed",
                reason,
            )
        if self._problem:
            return
        reader = archive.extractfile(member)
        assert reader is not None
        data = reader.read()
        if f".{ending}" in ENDINGS:
            self._row["images"].append(data)
        else:
            self._row[ending] = data

    def make_row(self, where: str) -> RawRow:
        """Return the row of these files."""
        return RawRow(where, self._problem or self._row)

    @property
    def num_images(self) -> int:
        """The number of images read."""
        return len(self._row["images"])

    def _reject(self, problem: str, reason: str) -> None:
        self._problem = self._problem or SampleError(f"{problem}: leave it out", reason=reason)
        self._row = {"id": self._row["id"], "images": []}


def _read_archive(file: IO[bytes], name: str, config: "ConvertConfig") -> Iterator[RawRow]:
    group: _Group | None = None
    try:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as archive:
            for member in archive:
                # tarfile would keep all members in memory
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                place = posixpath.join(folder, stem)
                if group and group.place != place:
                    yield group.make_row(f"{name} {group.place}")
                    group = None
                group = group or _Group(place, f"{name}/{place}")
                _add_file(group, archive, member, ending.lower(), config)
    except _BROKEN_ARCHIVE as error:
        raise ConfigError(
            f"{name!r} is not a complete tar archive ({error}): download it again"
        ) from error
    if group:
        yield group.make_row(f"{name} {group.place}")


def _add_file(
    group: _Group,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    ending: str,
    config: "ConvertConfig",
) -> None:
    last = ending.rpartition(".")[2]
    if f".{last}" in ENDINGS:
        limit = config.limits.max_image_bytes
        if group.num_images <= config.limits.max_images:  # one more than allowed rejects the row
            group.add(archive, member, last, limit)
    elif ending in ("json", "txt"):
        group.add(archive, member, ending, _MAX_JSON_BYTES if ending == "json" else MAX_TEXT_BYTES)
