"""Small raw data in the original layout of each source, and unusual images of many kinds."""

import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from llava_ray.config import ConvertConfig
from llava_ray.data.convert.inputs import digest_inputs
from llava_ray.data.convert.output import (
    begin_output,
    finalize_output,
    open_output,
    read_jobs,
    remove_surplus,
    write_num_jobs,
)
from llava_ray.data.convert.partition import make_shard_jobs
from llava_ray.data.convert.records import JobList, PendingSample, RejectedRow
from llava_ray.data.convert.write_shard import ShardJobRunner
from llava_ray.data.shards import write_text
from tests.support.tiny_checkpoint import make_image


def save(path: Path, seed: int = 0, **size: int) -> bytes:
    """Write an image of noise in the format that its name says; return its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(seed, **size).save(path)
    return path.read_bytes()


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def say(question: str, answer: str) -> list[dict[str, str]]:
    """Return one exchange in LLaVA's format."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava_row(number: int, **fields: Any) -> dict[str, Any]:
    turns = say(f"<image>\nWhat is number {number}?", f"It is {number}.")
    return {"id": f"row-{number}", "image": f"{number}.png", "conversations": turns, **fields}


def write_llava(folder: Path, num_rows: int = 8) -> Path:
    """Write rows with one image each, except every fifth (text only) and every seventh (two)."""
    rows = []
    for number in range(num_rows):
        row = llava_row(number)
        if number % 5 == 4:
            del row["image"]
            row["conversations"] = say(f"Count to {number}.", " ".join(map(str, range(number))))
        elif number % 7 == 6:
            row["image"] = [f"{number}.png", "0.png"]
            row["conversations"] = say("<image>\n<image>\nWhich is larger?", "The first.")
        save(folder / f"{number}.png", number, width=40 + number % 9, height=50 - number % 7)
        rows.append(row)
    write_json(folder / "data.json", rows)
    return folder


def read(source: str, folder: Path, **settings: Any) -> list[Any]:
    """Return what a source makes of a folder: (id, texts, images), or (id, reason)."""
    config = ConvertConfig(source=source, input=str(folder), output="unused", **settings)
    found: list[Any] = []
    for job in make_shard_jobs(config):
        for row in job.rows:
            if isinstance(row, RejectedRow):
                found.append((row.id, row.reason))
                continue
            assert isinstance(row, PendingSample)
            texts = [write_text(message) for message in row.sample.messages]
            found.append((row.sample.sample_id, texts, list(row.sample.images)))
    return found


def convert_here(config: ConvertConfig) -> list[int]:
    """Convert in this process and without limits; return which jobs it ran."""
    output = open_output(config)
    records = {record.number: record for record in read_jobs(output).records}
    begin_output(output, config, records.values())
    runner = ShardJobRunner(config)
    jobs = list(make_shard_jobs(config, done=records))
    records |= {job.number: runner.run(job) for job in jobs if not job.is_done}
    write_num_jobs(output, len(jobs))
    records = remove_surplus(output, records)
    done = JobList(inputs_digest=digest_inputs(config), records=list(records.values()))
    finalize_output(output, config, done, template=None)
    return [job.number for job in jobs if not job.is_done]


def odd_images() -> dict[str, bytes]:
    """Return valid images that are easily read wrongly, by name."""
    image = make_image(3, width=37, height=23)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    deep = Image.new("I;16", (31, 17), 40_000)
    frames = [make_image(seed, width=20, height=30).convert("P") for seed in range(3)]
    return {
        "plain.png": _encode(image, "PNG"),
        "plain.jpg": _encode(image, "JPEG"),
        "turned.jpg": _encode(image, "JPEG", exif=exif),
        "cmyk.jpg": _encode(image.convert("CMYK"), "JPEG"),
        "palette.png": _encode(image.convert("P"), "PNG"),
        "deep.png": _encode(deep, "PNG"),
        "moving.gif": _encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "misnamed.jpg": _encode(image, "PNG"),
        "single.png": _encode(make_image(1, width=1, height=1), "PNG"),
    }


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Return invalid files by name, each with the reason for its rejection."""
    good = _encode(make_image(0, width=200, height=200), "PNG")
    return {
        "cut.png": (good[: len(good) // 2], "image_corrupt"),
        "cut.jpg": (_encode(make_image(0, width=300, height=300), "JPEG")[:2000], "image_corrupt"),
        "empty.png": (b"", "image_empty"),
        "text.png": (b"not an image", "image_corrupt"),
        "bomb.png": (_bomb(60_000, 60_000), "image_oversized"),
        "thread.png": (_encode(make_image(0, width=1000, height=1), "PNG"), "image_oversized"),
    }


def _encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """Return a small PNG whose header declares a very large image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_pickle(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=0))
