"""The engine's answers with weights in 16 and in 8 bits, and with keys and values in 16 bits."""

import asyncio
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from llava_ray.config import DEMO_MODEL, EvaluateConfig, ModelConfig, ServeConfig
from llava_ray.demo.evaluate import make_cases
from llava_ray.demo.scenes import draw
from llava_ray.engine.factory import load_engine
from llava_ray.engine.protocol import Engine
from llava_ray.engine.torch_engine.execution.packed_linear import PackedLinear, quantize_linears
from llava_ray.model.export.export import export_model
from llava_ray.model.loading import load_model, load_without_weights
from llava_ray.model.precision import has_fast_bfloat16
from llava_ray.types import Chunk, Prompt, Sampling
from tests.support.conversations import say
from tests.support.tiny_checkpoint import make_image, tiny_model

slow_in_bfloat16 = pytest.mark.skipif(has_fast_bfloat16(), reason="auto is bfloat16 on this CPU")

PROMPTS = [
    Prompt("test", f"USER: <image> {words} ASSISTANT:", (make_image(i),), Sampling(
        max_tokens=12, temperature=0, ignore_eos=True, num_logprobs=1
    ))
    for i, words in enumerate(["what is it?", "where are the red and the blue one? " * 4, "a"])
]  # fmt: skip


def ask(*prompts: Prompt, **settings) -> list[list[Chunk]]:
    """Return what a new engine answers to all prompts at once."""

    async def read(engine: Engine, prompt: Prompt) -> list[Chunk]:
        return [chunk async for chunk in engine.stream(prompt)]

    async def main() -> list[list[Chunk]]:
        engine = load_engine(ModelConfig(device="cpu", num_threads=1, **settings))
        try:
            return await asyncio.gather(*[read(engine, each) for each in prompts])
        finally:
            await engine.close()

    return asyncio.run(main())


def write(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks).strip()


def first_logprob(chunks: list[Chunk]) -> float:
    return next(token.logprob for chunk in chunks for token in chunk.logprobs)


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def stored(request, tmp_path_factory) -> Path:
    """A checkpoint in 16 bits."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return export_model(tiny_model(), folder, dtype=request.param)


@slow_in_bfloat16
def test_weights_stay_in_the_16_bits_they_are_stored_in_and_nothing_is_lost(stored):
    kept = load_model(stored, dtype="stored", device="cpu").model
    wide = load_model(stored, dtype="float32", device="cpu")
    assert kept.dtype == getattr(torch, stored.parent.name[:-1])
    for mine, its in zip(kept.parameters(), wide.model.parameters(), strict=True):
        assert torch.equal(mine.float(), its)
    expected = []
    for prompt in PROMPTS:
        inputs = wide.encode(prompt.text, prompt.images)
        wide.model.generation_config.eos_token_id = None
        ids = wide.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected.append(wide.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert [write(chunks) for chunks in ask(*PROMPTS, path=str(stored))] == expected


def test_a_checkpoint_with_weights_of_32_bits_is_loaded_in_32():
    assert load_model(tiny_model(), dtype="stored", device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_change_little(stored, dtype):
    """Keys and values are in them, and where the CPU computes in them, all else."""
    exact = ask(*PROMPTS, path=str(stored), dtype="float32")
    near = ask(*PROMPTS, path=str(stored), dtype=dtype)
    for mine, its in zip(near, exact, strict=True):
        assert first_logprob(mine) == pytest.approx(first_logprob(its), abs=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_8_bits_is_near_and_depends_on_no_other_token(bias):
    torch.manual_seed(0)
    exact = torch.nn.Linear(96, 64, bias=bias)
    rounded = torch.nn.Sequential(exact)
    quantize_linears(rounded)
    assert isinstance(rounded[0], PackedLinear)
    states = torch.randn(9, 96) * torch.logspace(-3, 3, 9)[:, None]
    states[4] = 0
    with torch.inference_mode():
        output = rounded(states)
        assert torch.equal(output[5:6], rounded(states[5:6]))
        difference = (output - exact(states)).norm(dim=1)
        assert (difference <= 0.03 * exact(states).norm(dim=1) + 1e-6).all()


def test_answers_in_8_bits_are_the_same_alone_and_in_company():
    alone = [write(ask(each, path=str(tiny_model()), quantization="int8")[0]) for each in PROMPTS]
    together = ask(*PROMPTS, path=str(tiny_model()), quantization="int8")
    assert [write(chunks) for chunks in together] == alone
    exact = ask(*PROMPTS, path=str(tiny_model()), dtype="float32")
    for mine, its in zip(together, exact, strict=True):
        assert first_logprob(mine) == pytest.approx(first_logprob(its), abs=0.2)
        assert first_logprob(mine) != first_logprob(its)


def test_the_embedded_model_answers_in_8_bits_what_it_answers_in_32():
    template = load_without_weights(DEMO_MODEL).template
    cases = [case for case in make_cases(12) if not case.history]
    prompts = [
        Prompt(
            "test",
            template.render([say("user", f"<image>{case.question}")]),
            (draw(case.scene),),
            Sampling(temperature=0, max_tokens=60),
        )
        for case in cases
    ]
    exact = [write(chunks) for chunks in ask(*prompts, path=DEMO_MODEL, dtype="float32")]
    rounded = [write(chunks) for chunks in ask(*prompts, path=DEMO_MODEL, quantization="int8")]
    right = [case.answer for case in cases]
    assert sum(map(str.__eq__, exact, right)) > 0.85 * len(cases)
    assert sum(map(str.__eq__, rounded, exact)) > 0.95 * len(cases)


@pytest.mark.parametrize("kind", [ModelConfig, ServeConfig, EvaluateConfig])
def test_other_engines_have_a_quantization_of_their_own(kind):
    needed = {"data": "x", "output": "y", "tasks": ["pope"]} if kind is EvaluateConfig else {}
    settings = {"engine": "vllm", "quantization": "int8"}
    with pytest.raises(ValidationError, match=r"engine='vllm'.*engine_options\.quantization"):
        kind.model_validate(needed | settings)
