"""Which template a checkpoint is spoken to with, and how it reaches training and serving."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from llava_ray.config import LimitsConfig, ModelConfig
from llava_ray.engine.chat import chat
from llava_ray.engine.echo import EchoEngine
from llava_ray.engine.factory import load_engine
from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.errors import ConfigError
from llava_ray.model.choose_template import guess_template
from llava_ray.model.doctor import diagnose
from llava_ray.model.loading import LoadedModel, load_model
from llava_ray.types import ChatRequest, Message, Sampling
from tests.support.conversations import CHATML, learned, say, talk
from tests.support.llava_checkpoints import Original
from tests.support.tiny_checkpoint import make_image, tiny_model


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, dtype="float32", device="cpu", **options)


class Ends:
    """A tokenizer of which only the end of sequence is asked."""

    def __init__(self, eos_token: str) -> None:
        self.eos_token = eos_token


@pytest.mark.parametrize(
    ("metadata", "eos", "name"),
    [
        ({"text_model_type": "llama"}, "</s>", "vicuna_v1"),
        ({"text_model_type": "llama", "base_model": "lmsys/vicuna-13b-v1.5"}, "</s>", "vicuna_v1"),
        ({"base_model": "meta-llama/Llama-2-13b-chat-hf"}, "</s>", "llava_llama_2"),
        ({"base_model": "meta-llama/Llama-2-13b-hf"}, "</s>", "vicuna_v1"),
        ({"base_model": "./checkpoints/vicuna-7b-v0"}, "</s>", "llava_v0"),
        ({"text_model_type": "mistral"}, "</s>", "mistral_instruct"),
        ({"text_model_type": "mistral"}, "<|im_end|>", "chatml_direct"),
        ({"text_model_type": "llama"}, "<|im_end|>", "chatml_direct"),
        ({"text_model_type": "mpt"}, "<|endoftext|>", "mpt"),
        ({"text_model_type": "qwen2"}, "<|im_end|>", "qwen"),
        ({"text_model_type": "llama", "version": "v1"}, "</s>", "v1"),
        ({"text_model_type": "mistral", "version": "llava_llama_2"}, "</s>", "llava_llama_2"),
        ({"text_model_type": "llama", "version": "1.2.0"}, "</s>", "vicuna_v1"),
    ],
)
def test_the_template_is_guessed_by_what_the_files_say(
    metadata: dict[str, str], eos: str, name: str
) -> None:
    assert guess_template(metadata, Ends(eos)) == name


@pytest.mark.parametrize(
    ("original", "name"),
    [
        (Original(), "vicuna_v1"),
        (Original(text="mistral"), "mistral_instruct"),
        (Original(text="mpt"), "mpt"),
        (Original(extra={"llava_ray_template": "llava_v0"}), "llava_v0"),
        (Original(extra={"_name_or_path": "/data/Llama-2-7b-chat-hf"}), "llava_llama_2"),
    ],
)
def test_the_name_of_the_folder_says_nothing(original: Original, name: str, tmp_path: Path) -> None:
    loaded = load(original.write(tmp_path / "llava-v1-llama-2-mpt-chat-v0"))
    assert loaded.template.name == name


def test_a_given_template_comes_before_what_the_files_say(tmp_path: Path) -> None:
    folder = Original(extra={"llava_ray_template": "llava_v0"}).write(tmp_path / "model")
    assert load(folder, template="v1_mmtag").template.name == "v1_mmtag"
    loaded = load(tiny_model(), template="llava_llama_2")
    assert loaded.template.name == "llava_llama_2"
    assert load(tiny_model()).template.name == "own"
    assert load(tiny_model(), template="own").template.name == "own"


def test_a_template_that_is_not_known_is_told(tmp_path: Path) -> None:
    folder = Original().write(tmp_path / "model")
    with pytest.raises(ConfigError, match="'vicuna_v2': did you mean 'vicuna_v1'"):
        load(folder, template="vicuna_v2")
    with pytest.raises(ConfigError, match="has no chat template of its own"):
        load(folder, template="own")
    folder = Original(extra={"llava_ray_template": "v9"}).write(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"config\.json \(llava_ray_template\): there is no"):
        load(folder)


def test_a_language_models_own_template_is_not_taken_for_a_llavas(tmp_path: Path) -> None:
    folder = Original(text="mistral").write(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    source = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": source}))
    loaded = load(folder)
    assert loaded.processor.chat_template == source
    assert loaded.template.name == "mistral_instruct"
    assert loaded.template.render(talk("<image>\nhi")) == "[INST] <image>\nhi [/INST]"


@pytest.mark.parametrize("start_end", [False, True])
def test_a_core_trains_on_what_it_is_asked_with(start_end: bool, tmp_path: Path) -> None:
    loaded = load(Original(start_end=start_end).write(tmp_path / "model"))
    messages = talk("hi", "Hello.", "What is <image> here?", "A cat.")
    ids, labels = loaded.template.encode(messages, loaded.tokenizer, sample_id="a", num_images=1)
    assert learned(loaded.tokenizer, ids, labels) == [" Hello.</s>", " A cat.</s>"]
    prompt = loaded.template.render(messages[:3])
    asked = loaded.tokenize(prompt)
    assert ids[: len(asked)] == asked
    assert loaded.encode(prompt, [make_image()])["input_ids"].shape[1] > len(asked)


def test_a_published_core_trains_on_what_its_processor_reads() -> None:
    loaded = load(tiny_model())
    messages = talk("<image>\nWhat?", "A cat.", "Why?", "So.")
    ids, labels = loaded.template.encode(messages, loaded.tokenizer)
    assert [text.strip() for text in learned(loaded.tokenizer, ids, labels)] == [
        "A cat.</s>",
        "So.</s>",
    ]
    prompt = loaded.template.render(messages[:1])
    (read,) = loaded.encode(prompt, [make_image()])["input_ids"].tolist()
    start = next(i for i, label in enumerate(labels) if label != -100)
    asked = [i for i in read if i != loaded.image_token_id]
    assert ids[:start] == [*asked[: ids.index(-200)], -200, *asked[ids.index(-200) :]]


def test_a_stop_text_that_is_a_token_ends_answers_as_a_token(tmp_path: Path) -> None:
    original = Original(start_end=True, extra={"llava_ray_template": "chatml_direct"})
    original.tokenizer.add_tokens(list(CHATML), special_tokens=True)
    loaded = load(original.write(tmp_path / "model"))
    end, eos = loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert loaded.eos_token_ids == {end, eos}
    assert "< |im_end|>" in loaded.template.render([say("user", "x <|im_end|>")])


# Serving


async def ask(engine: EchoEngine, messages: list[Message], **sampling: Any) -> str:
    request = ChatRequest("1", "echo", tuple(messages), Sampling(**sampling))
    chunks = chat(engine, request, limits=LimitsConfig())
    return "".join([chunk.text async for chunk in chunks])


def test_an_answer_ends_before_the_stop_text_of_the_template() -> None:
    whole = asyncio.run(ask(EchoEngine(template="llava_v0"), talk("hi")))
    assert whole.startswith("A chat between a curious human")  # echo says all that it was told
    assert whole.endswith("answers to the human's questions.")


def test_the_stop_texts_of_a_request_stay() -> None:
    engine = EchoEngine(template="llava_v0")
    assert asyncio.run(ask(engine, talk("hi"), stop=("curious",))) == "A chat between a "


def test_whoever_ignores_the_end_ignores_stop_texts_too() -> None:
    engine = EchoEngine(template="llava_v0")
    text = asyncio.run(ask(engine, talk("hi"), ignore_eos=True, max_tokens=80))
    assert "###Human:" in text


def test_the_configuration_names_a_template() -> None:
    engine = load_engine(ModelConfig(engine="echo", template="v0"))
    assert engine.template.stop == ("###",)
    with pytest.raises(ConfigError, match="did you mean 'vicuna_v1'"):
        load_engine(ModelConfig(engine="echo", template="vicuna_1"))
    config = ModelConfig(path=str(tiny_model()), device="cpu", template="llava_v1")
    torch_engine = TorchEngine.load(config)
    assert torch_engine.template.name == "llava_v1"
    asyncio.run(torch_engine.close())


def test_the_doctor_names_the_template(tmp_path: Path) -> None:
    found = diagnose(Original(text="mistral").write(tmp_path / "model"))
    assert found.facts["template"] == "mistral_instruct; answers end at '</s>'"
    assert diagnose(tiny_model()).facts["template"] == "the checkpoint's own chat template"
