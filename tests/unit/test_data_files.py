"""Raw files: encodings, forms of JSON, and archives and links that somebody else has written."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llava_ray.data.sources.row_files import read_rows
from llava_ray.errors import ConfigError, SampleError
from llava_ray.storage import find_input, open_folder
from tests.support.raw_data import read, save, say, write_json, write_tar
from tests.unit.test_data_rows import list_rejects

ROWS = [{"id": f"{i}", "conversations": say("Où?", f"à {i}\u2028.")} for i in range(3)]
FOUND = [(row["id"], ["Où?", row["conversations"][1]["value"]], []) for row in ROWS]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
LIST = json.dumps(ROWS, ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("form", ["lines", "list", "wrapped"])
def test_every_unicode_encoding_is_read(encoding: str, form: str, tmp_path: Path) -> None:
    text = {"lines": LINES, "list": LIST, "wrapped": f'{{"version": 1, "data": {LIST}}}'}[form]
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert read("llava", tmp_path / name) == FOUND


def test_rows_in_latin_1_are_rejected_and_said_to_be(tmp_path: Path) -> None:
    rows = [*ROWS, {"id": "ascii", "conversations": say("a", "b")}]
    for name, text in (
        ("rows.json", json.dumps(rows, ensure_ascii=False)),
        ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
    ):
        text = text.replace("\u2028", "")
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        assert read("llava", tmp_path / name)[3] == ("ascii", ["a", "b"], [])
        rejects = list_rejects("llava", tmp_path / name)
        assert [reject.reason for reject in rejects] == ["encoding"] * 3
        assert "0xf9, which is not UTF-8 ('ù' in Latin-1): save the file as UTF-8" in (
            rejects[0].message
        )


def test_a_caption_in_latin_1_is_rejected_and_said_to_be(tmp_path: Path) -> None:
    image = save(tmp_path / "pairs" / "cafe.png")
    (tmp_path / "pairs" / "cafe.txt").write_bytes("un café".encode("latin-1"))
    save(tmp_path / "pairs" / "the.png")
    (tmp_path / "pairs" / "the.txt").write_bytes("du thé".encode("utf-16"))
    (reject,) = list_rejects("pairs", tmp_path / "pairs")
    assert (reject.id, reject.reason) == ("", "encoding")
    assert "byte 7 is 0xe9, which is 'é' in Latin-1" in reject.message
    assert read("pairs", tmp_path / "pairs")[1][1][1] == "du thé"
    write_tar(tmp_path / "x.tar", {"a.png": image, "a.txt": "un café".encode("latin-1")})
    assert read("webdataset", tmp_path / "x.tar") == [("x.tar/a", "encoding")]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("a list over lines", json.dumps(ROWS, indent=1)),
        ("a list with a row per line", "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]"),
        ("a list with rows after the bracket", "[" + ",\n".join(map(json.dumps, ROWS)) + "]"),
        ("objects over lines", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a wrapped list", json.dumps({"data": ROWS})),
        ("a wrapped list over lines", json.dumps({"version": [1], "rows": ROWS}, indent=1)),
        ("lines with blank ones", "\n\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("lines of Windows", "\r\n".join(map(json.dumps, ROWS))),
    ],
)
def test_every_form_of_json_is_read_whatever_the_file_is_called(
    form: str, text: str, tmp_path: Path
) -> None:
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text(text)
        assert read("llava", tmp_path / name) == FOUND, (form, name)


def test_a_single_row_and_nothing_are_read(tmp_path: Path) -> None:
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps(ROWS[0], indent=indent))
        assert read("llava", tmp_path) == FOUND[:1]
    for text in ("", "[]", " \n"):
        (tmp_path / "rows.json").write_text(text)
        assert read("llava", tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [{"id": 1}], "annotations": [{"id": 2}]}, "COCO's annotations: use .* coco"),
        ({"train": ROWS, "test": ROWS}, "several lists of rows .train, test.: write each"),
        ({"1": ROWS[0], "2": ROWS[1]}, "an object of rows by key .1, 2.: write the rows as a list"),
    ],
)
def test_forms_that_are_not_read_are_named(content: Any, message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "rows.json", content)
    with pytest.raises(ConfigError, match=message):
        read("llava", tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("x.parquet", "use the source hf"),
        ("x.tar", "use the source webdataset"),
        ("x.json.gz", "unpack"),
        ("x.csv", "JSON lines"),
    ],
)
def test_other_files_are_recognised_by_their_endings(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=f"only .*: .*{hint}"):
        read("llava", tmp_path)


def test_a_large_list_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"id": i, "text": "x" * (i % 7) * 100_000, "n": i} for i in range(60)]
    write_json(tmp_path / "rows.json", rows)
    folder = open_folder(str(tmp_path))
    assert [raw.row for raw in read_rows(folder, "rows.json")] == rows
    (tmp_path / "rows.json").write_text("".join(json.dumps(row, indent=1) for row in rows))
    assert [raw.row for raw in read_rows(folder, "rows.json")] == rows


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [("[" * 100_000 + "]" * 100_000, True), ('{"a":' * 20_000, False), ("[" * 100_000, False)],
)
def test_nested_json_takes_no_memory(text: str, is_whole: bool, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    tracemalloc.start()
    if is_whole:
        assert [row[1] for row in read("llava", tmp_path)] == ["bad_row"]
    else:
        with pytest.raises(ConfigError, match="is not JSON"):
            read("llava", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def write_tar_gz(path: Path, members: list[tuple[tarfile.TarInfo, int]]) -> None:
    """Write an archive of members that hold so many zeros."""
    with gzip.open(path, "wb", compresslevel=9) as packed:
        for member, num_bytes in members:
            member.size = num_bytes
            packed.write(member.tobuf(tarfile.GNU_FORMAT))
            for _ in range(0, num_bytes, 1 << 20):
                packed.write(bytes(1 << 20))
        packed.write(bytes(10240))


def test_a_small_archive_that_unpacks_to_a_large_file_is_rejected_by_its_size(
    tmp_path: Path,
) -> None:
    write_tar_gz(tmp_path / "x.tar.gz", [(tarfile.TarInfo("a.png"), 60 << 20)])
    assert (tmp_path / "x.tar.gz").stat().st_size < 400_000
    tracemalloc.start()
    (reject,) = list_rejects("webdataset", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (reject.id, reject.reason) == ("", "image_oversized")
    assert "has 62,914,560 bytes, more than the 16,777,216 allowed" in reject.message
    assert peak < 50e6


def test_a_header_that_unpacks_to_a_large_name_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    write_tar_gz(tmp_path / "x.tar.gz", [(header, 100 << 20), (tarfile.TarInfo("a.png"), 0)])
    with pytest.raises(ConfigError, match="a header says that it has 104,857,600 bytes"):
        read("webdataset", tmp_path)


def test_links_in_an_archive_are_rejected(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        row = json.dumps({"conversations": say("a", "b")}).encode()
        good = tarfile.TarInfo("b.json")
        good.size = len(row)
        archive.addfile(good, io.BytesIO(row))
    (reject,) = list_rejects("webdataset", tmp_path)
    assert (reject.where, reject.reason) == ("x.tar a", "image_path")
    assert len(read("webdataset", tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "header", "not a tar"])
def test_a_damaged_archive_is_named(damage: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {f"{i}.txt": b"x" * 2000 for i in range(4)})
    data = bytearray((tmp_path / "x.tar").read_bytes())
    if damage == "cut":
        del data[3000:]
    elif damage == "header":
        data[5 * 512 + 148] ^= 0xFF  # the checksum of the second header
    else:
        data = bytearray(b"what is this" * 100)
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ConfigError, match=r"'x.tar' is not a complete tar archive"):
        read("webdataset", tmp_path)


def test_links_out_of_the_folder_and_pipes_are_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    secret = tmp_path / "secret"
    save(secret / "a.png")
    (secret / "a.txt").write_text("secret")
    for name in ("link", "pipe", "good"):
        save(folder / f"{name}.png")
    (folder / "good.txt").write_text("good")
    (folder / "link.txt").symlink_to(secret / "a.txt")
    os.mkfifo(folder / "pipe.txt")
    rejects = {reject.where: reject for reject in list_rejects("pairs", folder)}
    assert {where: reject.reason for where, reject in rejects.items()} == {
        "link.png": "image_path",
        "pipe.png": "image_path",
    }
    assert "is a link out of the folder" in rejects["link.png"].message
    assert "is a pipe or a device" in rejects["pipe.png"].message
    assert len(read("pairs", folder)) == 3


def test_links_inside_the_folder_and_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    write_json(tmp_path / "rows" / "real.data", ROWS)
    (tmp_path / "rows" / "rows.json").symlink_to("real.data")
    assert read("llava", tmp_path / "rows") == FOUND
    cache = tmp_path / "datasets--x--y"
    write_json(cache / "blobs" / "0a1b", ROWS)
    snapshot = cache / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "rows.json").symlink_to("../../blobs/0a1b")
    assert read("llava", snapshot) == FOUND
    (tmp_path / "named.json").symlink_to("rows/real.data")
    assert read("llava", tmp_path / "named.json") == FOUND, "the user has chosen this link"


def test_a_confined_folder_reads_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "folder").symlink_to(tmp_path)
    folder, _ = find_input(str(tmp_path / "in"))
    for read_it in (folder.read, folder.open):
        with pytest.raises(SampleError, match="is a link out of the folder") as raised:
            read_it("folder/outside.txt")
        assert raised.value.reason == "image_path"
    with pytest.raises(FileNotFoundError):
        folder.read("missing.txt")
