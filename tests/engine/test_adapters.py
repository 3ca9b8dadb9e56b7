"""LoRA adapters in one batch: each answers as it does when it is merged into the weights."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from llava_ray.config import ModelConfig, ServeConfig
from llava_ray.engine.factory import load_engine
from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.errors import ConfigError, ModelNotFoundError
from llava_ray.model.export.export import export_model
from llava_ray.model.loading import load_model
from llava_ray.model.precision import has_fast_bfloat16
from llava_ray.types import Chunk, Prompt, Sampling
from tests.support.llava_checkpoints import Original
from tests.support.partial_checkpoints import make_lora, write_adapter, write_lora
from tests.support.tiny_checkpoint import make_image, tiny_model

pytestmark = pytest.mark.ray

IMAGE, OTHER = make_image(1), make_image(2)
SHAPES = {
    "text": {"target_modules": ["down_proj", "o_proj"], "exclude_modules": ".*vision_tower.*"},
    "tower": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 2},
    "pro.jector": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters from peft: of the language model, of the vision tower too, and with a projector."""
    return {
        name: train_adapter(str(tiny_model()), tmp_path_factory.mktemp("adapter"), seed, **settings)
        for seed, (name, settings) in enumerate(SHAPES.items())
    }


@torch.no_grad()
def train_adapter(base: str, folder: Path, seed: int, **settings) -> str:
    """Write an adapter with random weights; return its folder."""
    import peft

    torch.manual_seed(seed)
    model = load_model(base, dtype="float32", device="cpu").model
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def ask(adapter: str, text: str, *images, **sampling) -> Prompt:
    asked = Sampling(**{"temperature": 0, "max_tokens": 16} | sampling)
    return Prompt("test", text, images, asked, adapter=adapter)


def list_prompts(adapter: str) -> list[Prompt]:
    return [
        ask(adapter, "USER: what is this? ASSISTANT:"),
        ask(adapter, "USER: <image> what is this? ASSISTANT:", IMAGE),
        ask(adapter, "USER: <image> and <image> are alike? ASSISTANT:", OTHER, IMAGE),
    ]


async def read(engine: TorchEngine, prompt: Prompt) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(prompt)]


async def answer(engine: TorchEngine, prompt: Prompt) -> str:
    return "".join(chunk.text for chunk in await read(engine, prompt))


async def answer_alone(prompts: list[Prompt], path: str, base: str | None = None) -> list[str]:
    """Return the answers of a model with a merged adapter, asked one by one."""
    engine = TorchEngine(load_model(path, base=base, dtype="float32", device="cpu"))
    try:
        plain = [Prompt("test", each.text, each.images, each.sampling) for each in prompts]
        return [await answer(engine, each) for each in plain]
    finally:
        await engine.close()


def load(path: str, adapters: dict[str, str], **settings) -> TorchEngine:
    config = ModelConfig(
        path=path, adapters=adapters, dtype="float32", device="cpu", num_threads=1, **settings
    )
    return load_engine(config)  # type: ignore[return-value]


async def compare(path: str, adapters: dict[str, str]) -> list[str]:
    """Check that a model and its adapters, in one batch, answer as each does when it is merged."""
    expected = await answer_alone(list_prompts(""), path)
    for folder in adapters.values():
        expected += await answer_alone(list_prompts(""), folder, base=path)
    asked = [prompt for name in ("", *adapters) for prompt in list_prompts(name)]
    engine = load(path, adapters)
    try:
        assert await asyncio.gather(*(answer(engine, prompt) for prompt in asked)) == expected
    finally:
        await engine.close()
    return expected


def test_a_model_and_its_adapters_in_one_batch_say_what_each_says_merged(adapters) -> None:
    answers = asyncio.run(compare(str(tiny_model()), adapters))
    assert len(set(answers)) == len(answers), "the adapters make no difference"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_adapters_beside_weights_in_16_bits_say_what_they_say_merged(
    adapters, dtype, tmp_path: Path
) -> None:
    model = str(export_model(tiny_model(), tmp_path / "model", dtype="bfloat16"))

    async def main() -> None:
        merged = await answer_alone(list_prompts(""), adapters["text"], base=model)
        config = ModelConfig(
            path=model, adapters=adapters, dtype=dtype, device="cpu", num_threads=1
        )
        engine = load_engine(config)
        try:
            asked = [await read(engine, prompt) for prompt in list_prompts("text")]
        finally:
            await engine.close()
        if dtype == "auto" and not has_fast_bfloat16():
            assert ["".join(chunk.text for chunk in each) for each in asked] == merged
        assert all(each[-1].finish_reason for each in asked)

    asyncio.run(main())


def test_an_adapter_over_packed_weights_says_what_it_says_merged(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4}
    folder = train_adapter("demo", tmp_path, 7, **settings)
    asyncio.run(compare("demo", {"mine": folder}))


def test_what_llavas_own_training_leaves_is_an_adapter_with_a_projector(tmp_path: Path) -> None:
    whole = Original().write(tmp_path / "whole")
    other = Original()
    with torch.no_grad():
        for tensor in other.projector_tensors().values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
    folder = write_lora(other, tmp_path / "lora", base_model_name_or_path=str(whole))
    answers = asyncio.run(compare(str(whole), {"lora": str(folder)}))
    assert answers[:3] != answers[3:]


def test_what_one_adapter_computed_is_kept_for_itself_alone(adapters) -> None:
    async def main() -> None:
        engine = load(str(tiny_model()), adapters)
        asked = [ask(name, "USER: " + "a long question " * 8) for name in ("", "text", "tower")]
        for _ in range(2):
            last = [(await read(engine, prompt))[-1] for prompt in asked]
        assert all(chunk.num_cached_tokens > 16 for chunk in last)
        await engine.close()
        engine = load(str(tiny_model()), adapters)
        last = [(await read(engine, prompt))[-1] for prompt in asked]
        assert [chunk.num_cached_tokens for chunk in last] == [0, 0, 0]
        await engine.close()

    asyncio.run(main())


def test_a_replica_that_lacks_an_adapter_says_so_and_does_not_answer_as_its_model(adapters) -> None:
    async def main() -> None:
        engine = load(str(tiny_model()), {"text": adapters["text"]})
        try:
            with pytest.raises(ModelNotFoundError, match="no adapter 'new': ask for text"):
                await read(engine, ask("new", "USER: hello"))
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "not a plain LoRA"),
        ({"target_modules": ["q_proj", "lm_head"]}, "changes lm_head, which all requests"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "changes model.language_model.embed_tokens.weight",
        ),
        ({"target_modules": ["embed_tokens"]}, "not a plain LoRA"),
    ],
)
def test_an_adapter_that_cannot_be_beside_others_is_refused(settings, reason, tmp_path) -> None:
    folder = train_adapter(str(tiny_model()), tmp_path, 1, **settings)
    with pytest.raises(ConfigError, match=f"{reason}.*export"):
        load(str(tiny_model()), {"mine": folder})


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    tensors = make_lora(Original())
    tensors = {name.replace("layers.0", "layers.9"): each for name, each in tensors.items()}
    folder = write_adapter(tmp_path, tensors, "the/base")
    with pytest.raises(ConfigError, match="trained on another model"):
        load(str(Original().write(tmp_path / "whole")), {"mine": str(folder)})


def test_an_adapter_whose_weights_are_all_zero_is_refused(tmp_path: Path) -> None:
    tensors = {n: t * 0 if "lora_B" in n else t for n, t in make_lora(Original()).items()}
    folder = write_adapter(tmp_path, tensors, "the/base")
    with pytest.raises(ConfigError, match="changes no logits"):
        load(str(Original().write(tmp_path / "whole")), {"mine": str(folder)})


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_other_engines_say_how_an_adapter_is_served_there(engine: str) -> None:
    with pytest.raises(ConfigError, match="serve mine as models of their own"):
        load_engine(ModelConfig(path="demo", engine=engine, adapters={"mine": "/some/folder"}))


# ---- behind the gateway ----


@pytest.fixture(scope="module")
def url(served: str) -> Iterator[str]:
    from ray import serve

    from llava_ray.app import build_app

    model = ModelConfig(path="pet", engine="echo", num_cpus=0.1, adapters={"cat": "a", "dog": "b"})
    config = ServeConfig(models=[model], page=False)
    serve.run(build_app(config), name="adapters", route_prefix="/adapters")
    yield f"{served}/adapters"
    serve.delete("adapters")


def test_a_request_names_an_adapter_behind_its_model(url: str) -> None:
    said = {}
    for name in ("pet", "pet:cat", "pet:dog"):
        body = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False).json()
        assert answer["model"] == name
        said[name] = answer["choices"][0]["message"]["content"]
    assert said == {
        "pet": "Hello (0 images)",
        "pet:cat": "Hello (0 images, cat)",
        "pet:dog": "Hello (0 images, dog)",
    }
    body = {"model": "pet:dog", "prompt": "Once"}
    answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False).json()
    assert answer["choices"][0]["text"] == "Once (0 images, dog)"


def test_adapters_are_listed_with_the_model_that_they_belong_to(url: str) -> None:
    models = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    parents = {model["id"]: model["parent"] for model in models}
    assert parents == {"pet": None, "pet:cat": "pet", "pet:dog": "pet"}
    assert httpx.get(f"{url}/v1/models/pet:cat", trust_env=False).json()["parent"] == "pet"
    assert httpx.get(f"{url}/readyz", trust_env=False).json()["models"] == {"pet": "ready"}


def test_an_unknown_adapter_is_not_found_and_the_answer_lists_those_there_are(url: str) -> None:
    body = {"model": "pet:cow", "messages": [{"role": "user", "content": "Hello"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith("use one of pet, pet:cat, pet:dog")
