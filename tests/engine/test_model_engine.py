"""What is loaded is served: our own engine continues every kind as transformers does."""

import asyncio
from pathlib import Path

import pytest
import torch
from model.test_hf_format import write_published
from PIL import Image
from support.llava_checkpoints import Original
from support.tiny_checkpoint import make_image

from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.errors import ConfigError
from llava_ray.model.loading import LoadedModel, load_model
from llava_ray.types import Prompt, Sampling

PROMPTS = [
    ("look: <image>\nand <image> what?", [make_image(), make_image(1, width=31, height=97)]),
    ("<image> a", [make_image(2, width=90, height=30)]),
    ("no image", []),
]
KINDS = {
    "anyres": Original(text="mistral", aspect="anyres", merge="spatial_unpad"),
    "three-layer projector": Original(text="qwen2", projector="mlp3x_gelu"),
    "siglip": Original(tower="siglip", aspect="pad"),
}


async def answer(engine: TorchEngine) -> list[str]:
    async def ask(text: str, images: list[Image.Image]) -> str:
        sampling = Sampling(max_tokens=6, temperature=0, ignore_eos=True)
        prompt = Prompt(text, text, tuple(images), sampling)
        return "".join([chunk.text async for chunk in engine.stream(prompt)])

    try:
        return await asyncio.gather(*(ask(text, images) for text, images in PROMPTS))
    finally:
        await engine.close()


def generate(core: LoadedModel, text: str, images: list[Image.Image]) -> str:
    inputs = core.encode(text, images)
    length = inputs["input_ids"].shape[1]
    ids = core.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return core.tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def assert_served_as_generated(core: LoadedModel) -> None:
    core.model.generation_config.eos_token_id = None
    expected = [generate(core, text, images) for text, images in PROMPTS]
    assert asyncio.run(answer(TorchEngine(core))) == expected


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
