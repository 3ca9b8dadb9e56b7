"""What is loaded is served: our own engine continues every kind as transformers does."""

import asyncio
from pathlib import Path

import pytest
import torch

from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.errors import ConfigError
from llava_ray.model.loading import load_model
from llava_ray.types import Prompt, Sampling
from tests.support.hf_checkpoints import write_published
from tests.support.llava_checkpoints import Original
from tests.support.onevision import CHECKPOINT, read_records
from tests.support.served_as_generated import assert_served_as_generated, generate

KINDS = {
    "anyres": Original(text="mistral", aspect="anyres", merge="spatial_unpad"),
    "three-layer projector": Original(text="qwen2", projector="mlp3x_gelu"),
    "siglip": Original(tower="siglip", aspect="pad"),
    "a newline behind each image": Original(text="qwen2", aspect="pad", merge="spatial_unpad"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_original_checkpoints_are_served(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind].write(tmp_path / "model")
    assert_served_as_generated(load_model(folder, dtype="float32", device="cpu"))


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_tiles_of_transformers_checkpoints_are_served(kind: str, tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", kind)
    assert_served_as_generated(load_model(folder, dtype="float32", device="cpu"))


def test_mpt_is_refused_by_the_engine_with_what_to_do(tmp_path: Path) -> None:
    core = load_model(Original(text="mpt").write(tmp_path / "model"), device="cpu")
    assert next(core.model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="'mpt' computes its attention in a way of its own"):
        TorchEngine(core)


def test_an_image_has_other_features_alone_than_beside_others() -> None:
    model = load_model(CHECKPOINT, dtype="float32", device="cpu")
    model.model.generation_config.eos_token_id = None
    one, *_, pair, four, _ = read_records()
    prompts = [
        (one.prompt, [pair.images[0]]),
        (pair.prompt, list(pair.images)),
        (four.prompt, list(four.images)),
        (one.prompt, [pair.images[1]]),
        (pair.prompt, list(pair.images)),
    ]
    expected = [generate(model, text, images) for text, images in prompts]

    async def ask_in_turn() -> list[str]:
        engine = TorchEngine(model)
        sampling = Sampling(max_tokens=6, temperature=0, ignore_eos=True)
        answers = []
        for text, images in prompts:
            asked = engine.stream(Prompt("one", text, tuple(images), sampling))
            answers.append("".join([chunk.text async for chunk in asked]))
        await engine.close()
        return answers

    assert asyncio.run(ask_in_turn()) == expected
