"""`llava-ray demo raw`: what the tiny training run begins with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from jobs.embedded_model.raw import NUM_TURNS, write_raw
from llava_ray.demo import MODEL_DIR
from llava_ray.demo.scenes import PIXELS
from llava_ray.model import load_model
from llava_ray.model.build.build import build_llava


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder, num_scenes=3)
    return folder


def test_every_scene_has_a_description_and_a_conversation_in_the_format_of_llava(
    raw: Path,
) -> None:
    captions = json.loads((raw / "captions.json").read_text())
    conversations = json.loads((raw / "conversations.json").read_text())
    for caption, conversation in zip(captions, conversations, strict=True):
        assert caption["image"] == conversation["image"]
        with Image.open(raw / "images" / caption["image"]) as image:
            assert image.size == (PIXELS, PIXELS)
        assert caption["conversations"][1]["value"].startswith("There is ")
        turns = conversation["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * NUM_TURNS
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)


def test_its_parts_join_to_a_llava_that_reads_text_as_the_embedded_model_does(
    raw: Path, tmp_path: Path
) -> None:
    built = build_llava(tmp_path / "new", llm=raw / "llm", vision_tower=raw / "tower")
    new, embedded = (
        load_model(folder, dtype="float32", device="cpu") for folder in (built, MODEL_DIR)
    )
    torch.testing.assert_close(read_text(new), read_text(embedded))
    towers = [dict(core.model.named_parameters()) for core in (new, embedded)]
    shared = [name for name in towers[0] if "vision_tower" in name]
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in shared)


@torch.inference_mode()
def read_text(core: Any) -> torch.Tensor:
    return core.model(**core.encode("What is a circle?", [])).logits
