"""The check that our engine continues prompts exactly as transformers' `generate` does."""

import asyncio

from PIL import Image

from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.model.loading import LoadedModel
from llava_ray.types import Prompt, Sampling
from tests.support.tiny_checkpoint import make_image

PROMPTS = [
    ("look: <image>\nand <image> what?", [make_image(), make_image(1, width=31, height=97)]),
    ("<image> a", [make_image(2, width=90, height=30)]),
    ("no image", []),
]


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
