"""Looking into shards: the numbers, and the page with images and loss mask."""

import re
from pathlib import Path

import pytest

from llava_ray.config import ConvertConfig
from llava_ray.data.inspect import draw_histogram
from tests.support.command_line import run
from tests.support.raw_data import convert_here, say, write_json, write_llava
from tests.support.tiny_checkpoint import tiny_model


def make(tmp_path: Path, **settings: object) -> Path:
    raw = write_llava(tmp_path / "raw", 21)
    (raw / "3.png").write_bytes(b"")
    fields = {"source": "llava", "input": str(raw), "output": str(tmp_path / "out")}
    convert_here(ConvertConfig.model_validate(fields | settings))
    return tmp_path / "out"


def test_the_command_prints_counts_lengths_sizes_and_rejects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, _ = run(capsys, "data", "inspect", make(tmp_path, model=str(tiny_model())))
    assert code == 0
    for said in (
        "20 samples from 'llava' in 1 shards",
        f"tokens counted for {tiny_model()}",
        "images: 4 with none, 13 with one, 3 with 2",
        "length in tokens:",
        "grouping=length",
        "from 40 x 44 to 48 x 50 (19 images)",
        "1 rows rejected:",
        "1  image_empty",
    ):
        assert said in told, told
    bars = [int(line.rsplit(" ", 1)[1]) for line in told.splitlines() if " - " in line]
    assert sum(bars) == 20


def test_without_a_model_lengths_are_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, told, _ = run(capsys, "data", "inspect", make(tmp_path))
    assert "length in words:" in told
    assert "tokens" not in told


def test_the_page_shows_images_and_marks_what_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = make(tmp_path), tmp_path / "page.html"
    words = ["--page", page, "--num-samples", "20", "--model", tiny_model()]
    code, _, noted = run(capsys, "data", "inspect", out, *words)
    assert (code, noted) == (0, f"20 samples: {page}\n")
    written = page.read_text()
    assert written.count("<img src='data:image/png;base64,") == 19
    assert written.count("image, 16 tokens</b>") == 19
    marked = re.findall(r"<mark>(.*?)</mark>", written)
    assert any("It is 2." in text for text in marked)
    assert not any("What is number" in text for text in marked)


def test_what_people_wrote_cannot_act_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "<b>", "conversations": say("<script>alert(1)</script>", "<i>no</i>")}]
    write_json(tmp_path / "raw" / "rows.json", rows)
    fields = {"source": "llava", "input": str(tmp_path / "raw"), "output": str(tmp_path / "out")}
    convert_here(ConvertConfig.model_validate(fields))
    run(capsys, "data", "inspect", tmp_path / "out", "--page", tmp_path / "page.html")
    written = (tmp_path / "page.html").read_text()
    assert "<script>" not in written
    assert "<i>" not in written
    assert "&lt;script&gt;alert(1)" in written


def test_a_folder_without_shards_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(capsys, "data", "inspect", "/no/such")
    assert code == 2
    assert "give a folder that `llava-ray convert` wrote" in said


def test_a_histogram_has_a_bar_for_each_range() -> None:
    lines = draw_histogram([1] * 99 + [13])
    assert len(lines) == 12
    assert lines[0].endswith(f"{'█' * 40} 99")
    assert lines[-1].endswith("█ 1")
