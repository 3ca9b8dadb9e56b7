"""The command line around checkpoints: doctor, build, export, delta; what is printed, and codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import run
from tests.support.llava_checkpoints import Original
from tests.support.partial_checkpoints import write_projector_only
from tests.support.reference_logits import assert_same_logits, load
from tests.support.tiny_checkpoint import tiny_model


def test_the_doctor_says_what_it_found_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = run(capsys, "doctor", tiny_model())
    assert code == 0
    for said in ("a LLaVA with all its weights", "language model llama", "no problems found"):
        assert said in told


def test_the_doctor_names_problems_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_projector_only(Original(), tmp_path / "projector")
    code, told, _ = run(capsys, "doctor", folder)
    assert code == 1
    assert "problem: " in told
    assert "give the language model that it was trained on as base" in told
    base = Original().write_lm(tmp_path / "base")
    code, told, _ = run(capsys, "doctor", folder, "--base", base)
    assert code == 0
    assert "a projector over a language model" in told
    assert run(capsys, "doctor", "/no/such")[0] == 1


def test_a_model_is_built_and_exported_and_the_folders_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = Original().write_lm(tmp_path / "lm")
    clip = Original().write_tower(tmp_path / "clip")
    parts = ["--llm", lm, "--vision-tower", clip, "--projector", "mlp2x_gelu", "--aspect", "pad"]
    code, told, _ = run(capsys, "build", *parts, tmp_path / "new")
    assert (code, told) == (0, f"{tmp_path / 'new'}\n")
    for export_format in ("hf", "vllm", "original"):
        out = tmp_path / export_format
        code, told, _ = run(capsys, "export", tmp_path / "new", out, "--to", export_format)
        assert (code, told) == (0, f"{out}\n")
        assert load(out).checkpoint.aspect_mode == "pad"


def test_a_delta_is_made_and_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = Original().write_lm(tmp_path / "base")
    folder = Original().write(tmp_path / "trained")
    below = ["--base", base]
    assert run(capsys, "delta", "make", folder, tmp_path / "delta", *below)[0] == 0
    assert run(capsys, "delta", "apply", tmp_path / "delta", tmp_path / "whole", *below)[0] == 0
    assert_same_logits(load(tmp_path / "whole"), Original())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "/no/such", "OUT"], "there is no such folder"),
        (["export", "TINY", "OUT", "--max-shard-size", "much"], "'much' is not a size"),
        (["export", "TINY", "OUT", "--base", "TINY"], "leave base out"),
        (["export", "TINY", "TINY"], "is not empty"),
        (["export", "TINY", "OUT", "--tower-name", "x"], "leave --tower-name out"),
        (["build", "OUT", "--llm", "TINY", "--vision-tower", "TINY"], "already has a vision tower"),
        (["delta", "make", "TINY", "OUT", "--base", "TINY"], "--to original"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:1] + value[3:4]),
)
def test_a_mistake_ends_with_its_remedy_and_code_2(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"TINY": tiny_model(), "OUT": tmp_path / "out"}
    code, _, said = run(capsys, *[places.get(word, word) for word in words])
    assert code == 2
    assert said.startswith("error: ")
    assert told in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_the_folder_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava_ray.cli", "export", tiny_model(), tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'out'}\n", "")
