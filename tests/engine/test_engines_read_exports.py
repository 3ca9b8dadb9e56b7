"""What `export` writes loads in vLLM and SGLang, which give the tokens that transformers gives.

Each engine runs in an environment of its own, since neither belongs among this package's
dependencies. Name its Python (or a script that starts it, with what it needs on PYTHONPATH):

    LLAVA_RAY_VLLM_PYTHON=.../bin/python LLAVA_RAY_SGLANG_PYTHON=.../bin/python \\
        pytest -m "vllm or sglang" tests/engine/test_engines_read_exports.py

All weights are random, but for the embedded model's: what is compared is arithmetic, in float32. Of
the language models each head has 32 numbers, the fewest that vLLM's CPU kernels take.
"""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_ray.demo import scenes
from llava_ray.model.build.random_model import TINY, build_random_model
from llava_ray.model.export.export import export_model
from llava_ray.model.loading import load_model
from tests.support import hf_checkpoints, llava_checkpoints
from tests.support.llava_checkpoints import Original
from tests.support.tiny_checkpoint import make_image

PYTHONS = {"vllm": "LLAVA_RAY_VLLM_PYTHON", "sglang": "LLAVA_RAY_SGLANG_PYTHON"}
GOLDEN = Path(__file__).parents[1] / "golden"
PROGRAM = Path(__file__).parents[1] / "support" / "read_with_engine.py"
TIMEOUT_S = 600
NUM_NEW_TOKENS = 16
NEAR_TIE = 0.05
"""Two best logits this close may change places: torchvision, which the engines use and this package
does not need, scales images with other roundings (1 of 255 in a few pixels of a thousand)."""
NEAR_TIE_16 = 0.1
"""The same where the engine computes in float16."""
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # SGLang is ten times slower with as many as there are cores
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process imports it, not three
    "VLLM_NO_USAGE_STATS": "1",
}

SHAPE = replace(TINY, hidden_size=128, vision_hidden_size=64)
HIDDEN = 128
QUESTIONS = [
    ("USER: <image>\nWhat is it? ASSISTANT:", [0]),
    ("USER: <image>\nWhat is it? ASSISTANT:", [1]),
    ("USER: see <image>\nand <image> what differs? ASSISTANT:", [1, 2]),
    ("USER: no image. ASSISTANT:", []),
]


@dataclass(frozen=True)
class Greedy:
    """Tokens of greedy decoding, and by how much each one's logit was the best."""

    prompt_length: int
    ids: list[int]
    gaps: list[float]


# What is exported


def export_tiny(scratch: Path, out: Path) -> None:
    tiny = build_random_model(scratch / "tiny", SHAPE)
    export_model(tiny, out, to="hf", max_shard_size="300KB")
    assert (out / "model.safetensors.index.json").exists()


def export_next(scratch: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hf_checkpoints.TEXT, "hidden_size", HIDDEN)
        folder, _ = hf_checkpoints.write_published(scratch / "next", "llava_next")
    settings = json.loads((folder / "processor_config.json").read_text())
    assert "vision_feature_select_strategy" not in settings, "as in older folders"
    export_model(folder, out, to="hf")


def export_lora(scratch: Path, out: Path) -> None:
    base = build_random_model(scratch / "tiny", SHAPE)
    core = load_model(base, dtype="float32", device="cpu")
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trained: Any = peft.get_peft_model(core.model, lora)
    trained.save_pretrained(scratch / "adapter", save_embedding_layers=False)
    export_model(scratch / "adapter", out, to="hf", base=base)


def export_demo(scratch: Path, out: Path) -> None:
    export_model("demo", out, to="hf")


def export_original(original: Original, to: Any = "hf") -> Callable[[Path, Path], None]:
    def export(scratch: Path, out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llava_checkpoints, "HIDDEN", HIDDEN)
            folder = replace(original).write(scratch / "original")
        export_model(folder, out, to=to)

    return export


def export_golden(scratch: Path, out: Path) -> None:
    checkpoint = GOLDEN / "llava-v1.5-pad" / "checkpoint"
    export_model(checkpoint, out, to="hf", vision_tower=GOLDEN / "openai-clip-micro")


BOTH = {
    "tiny": export_tiny,
    "next": export_next,
    "lora": export_lora,
    "demo": export_demo,
    "original, pad": export_original(Original(aspect="pad")),
    "original, anyres, mistral": export_original(
        Original(text="mistral", aspect="anyres", merge="spatial_unpad")
    ),
    "original, siglip, qwen2": export_original(Original(text="qwen2", tower="siglip")),
    "original, marks": export_original(Original(start_end=True)),
}
ONLY_SGLANG = {
    "original, linear projector": export_original(Original(projector="linear")),
    "golden": export_golden,  # its heads are too small for vLLM on a CPU
}


@functools.cache
def folder_of(kind: str) -> Path:
    """Export a kind of checkpoint, once for all engines; return the folder."""
    scratch = Path(tempfile.mkdtemp(prefix="llava-ray-exports-"))
    (BOTH | ONLY_SGLANG)[kind](scratch, scratch / "out")
    return scratch / "out"


def questions_for(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Write images into the folder; return the questions as `other_engines` takes them."""
    asked, shown = (
        QUESTIONS,
        [make_image(), make_image(1, width=31, height=97), make_image(2, width=90)],
    )
    if kind == "golden":
        case = GOLDEN / "llava-v1.5-pad"
        return [
            {"prompt": record["prompt"], "images": [str(case / name) for name in record["images"]]}
            for record in json.loads((case / "golden.json").read_text())["records"]
        ]
    if kind == "demo":
        rng = random.Random(0)
        shown = [scenes.draw(scenes.make_scene(rng)) for _ in range(3)]
        asked = [
            (f"<s>USER: {text} ASSISTANT:", images)
            for text, images in [
                ("<image>\nWhat is in the picture?", [0]),
                ("<image>\nWhat is in the picture?", [1]),
                ("<image>\n<image>\nHow many things are there?", [1, 2]),
                ("Who are you?", []),
            ]
        ]
    files = [folder / f"{i}.png" for i in range(len(shown))]
    for file, image in zip(files, shown, strict=True):
        image.save(file)
    return [{"prompt": text, "images": [str(files[i]) for i in used]} for text, used in asked]


# Who answers


@torch.inference_mode()
def ask_transformers(folder: Path, questions: list[dict[str, Any]]) -> list[Greedy]:
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for question in questions:
        images = [Image.open(file) for file in question["images"]]
        inputs = processor(text=question["prompt"], images=images or None, return_tensors="pt")
        out = model.eval().generate(
            **inputs,
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        length = inputs["input_ids"].shape[1]
        best = [logits[0].float().topk(2).values.tolist() for logits in out.logits]
        gaps = [first - second for first, second in best]
        answers.append(Greedy(length, out.sequences[0, length:].tolist(), gaps))
    return answers


def find_python(engine: str) -> str:
    """Return the Python of an engine's environment; skip the test if none is named."""
    variable = PYTHONS[engine]
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} is not set: it names the Python of an environment with {engine}")
    return python


def ask_engine(
    engine: str, folder: Path, questions: list[dict[str, Any]], scratch: Path, *more: str
) -> list[dict[str, Any]]:
    """Return what an engine answers in its own environment."""
    asked, answered = scratch / "questions.json", scratch / "answers.json"
    asked.write_text(json.dumps(questions))
    with subprocess.Popen(
        [find_python(engine), str(PROGRAM), engine, str(folder), str(asked), str(answered), *more],
        env=os.environ | SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what the engine started can be stopped with it
    ) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert answered.exists(), f"{engine} does not read {folder}:\n{said[-8000:]}"
    return json.loads(answered.read_text())


def assert_same_tokens(
    found: list[dict[str, Any]], expected: list[Greedy], *, near_tie: float = NEAR_TIE
) -> None:
    for number, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        assert theirs["prompt_length"] == ours.prompt_length, f"question {number}"
        pairs = zip(theirs["ids"], ours.ids, strict=True)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        assert at is None or ours.gaps[at] < near_tie, (
            f"question {number}: token {at} differs, where the best logit leads by {ours.gaps[at]}:"
            f"\n{theirs['ids']}\n{ours.ids}"
        )


@pytest.mark.vllm
@pytest.mark.parametrize("kind", BOTH)
def test_vllm_gives_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    compare("vllm", kind, tmp_path)


@pytest.mark.vllm
def test_vllm_reads_a_projector_of_one_layer_that_is_exported_for_it(tmp_path: Path) -> None:
    find_python("vllm")
    export_original(Original(projector="linear"))(tmp_path, tmp_path / "hf")
    export_model(tmp_path / "original", tmp_path / "vllm", to="vllm")
    questions = questions_for("original", tmp_path)
    expected = ask_transformers(tmp_path / "hf", questions)  # which lacks vLLM's activation
    assert_same_tokens(ask_engine("vllm", tmp_path / "vllm", questions, tmp_path), expected)


@pytest.mark.sglang
@pytest.mark.parametrize("kind", BOTH | ONLY_SGLANG)
def test_sglang_gives_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    compare("sglang", kind, tmp_path)


@pytest.mark.sglang
def test_sglang_s_own_class_reads_what_is_exported_to_original(tmp_path: Path) -> None:
    """It computes in float16 and needs a tokenizer with `<image>`, that of the other form."""
    find_python("sglang")
    export_original(Original(aspect="pad"))(tmp_path, tmp_path / "hf")
    export_model(tmp_path / "original", tmp_path / "again", to="original")
    questions = questions_for("original", tmp_path)
    expected = ask_transformers(tmp_path / "hf", questions)
    tokenizer = str(tmp_path / "hf")
    found = ask_engine("sglang", tmp_path / "again", questions, tmp_path, tokenizer)
    assert_same_tokens(found, expected, near_tie=NEAR_TIE_16)


def test_transformers_counts_tokens_as_the_model_does_whatever_the_processor_left_out(
    tmp_path: Path,
) -> None:
    export_next(tmp_path, tmp_path / "out")
    questions = questions_for("next", tmp_path)
    core = load_model(tmp_path / "next", dtype="float32", device="cpu")
    for question, found in zip(
        questions, ask_transformers(tmp_path / "out", questions), strict=True
    ):
        inputs = core.encode(question["prompt"], [Image.open(file) for file in question["images"]])
        out = core.model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert (found.prompt_length, found.ids) == (length, out[0, length:].tolist())


def compare(engine: str, kind: str, scratch: Path) -> None:
    find_python(engine)  # before the work
    folder = folder_of(kind)
    questions = questions_for(kind, scratch)
    expected = ask_transformers(folder, questions)
    assert expected[0].ids != expected[1].ids, "the image must make a difference"
    assert_same_tokens(ask_engine(engine, folder, questions, scratch), expected)
