"""Building: a language model and a tower become a LLaVA that reads text as before, and trains."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import CONFIG_MAPPING

from llava_ray.errors import ConfigError
from llava_ray.model.build.build import build_llava
from llava_ray.model.build.random_model import build_byte_tokenizer
from llava_ray.model.export.export import export_model
from llava_ray.types import ImagePart, Message, TextPart
from tests.support.llava_checkpoints import Original
from tests.support.reference_logits import load
from tests.support.served_as_generated import assert_served_as_generated
from tests.support.tiny_checkpoint import make_image

CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]\n"
    "{{ message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@dataclass(frozen=True)
class Pair:
    """What is put together."""

    text: str = "llama"
    tower: str = "clip"
    settings: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(repr(self))


PAIRS = {
    "llama": Pair(),
    "tied, siglip, pad, linear": Pair(
        tower="siglip",
        settings={"image_aspect": "pad", "projector": "linear"},
        text_config={"tie_word_embeddings": True},
    ),
    "mistral, anyres": Pair("mistral", settings={"image_aspect": "anyres"}),
    "qwen2, siglip, anyres": Pair("qwen2", "siglip", {"image_aspect": "anyres"}),
    "qwen3, class token": Pair("qwen3", settings={"select_feature": "cls_patch"}),
    "gemma": Pair("gemma", text_config={"tie_word_embeddings": True}),
    "gemma3_text": Pair("gemma3_text", "siglip", {"select_layer": -1}),
    "smollm3": Pair("smollm3"),
    "gpt_neox": Pair("gpt_neox"),
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def write_language_model(
    folder: Path, kind: str = "llama", *, rows: int = 0, chat: str | None = None, **settings: Any
) -> Any:
    """Write a causal language model that has never heard of images; return the model."""
    tokenizer = build_byte_tokenizer(context_length=512)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    more: dict[str, Any] = {name: getattr(tokenizer, name) for name in tokens}
    if kind != "gpt_neox":
        more["num_key_value_heads"] = 2
    if kind.startswith("gemma") or kind == "qwen3":
        more["head_dim"] = 8
    size = rows or len(tokenizer) - 1  # the last is <image>
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(SIZES | more | {"vocab_size": size} | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        for key in ("image_token", "model_specific_special_tokens", "extra_special_tokens"):
            content.pop(key, None)
        if "added_tokens" in content:
            added = content["added_tokens"]
            content["added_tokens"] = [t for t in added if t["content"] != "<image>"]
        (folder / name).write_text(json.dumps(content))
    return model


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the language model of a pair and the folder that it was built into, made once."""
    scratch = tmp_path_factory.mktemp("built")
    Original().write_tower(scratch / "clip")
    Original(tower="siglip").write_tower(scratch / "siglip")

    @cache
    def build(pair: Pair) -> tuple[Any, Path]:
        folder = scratch / f"{abs(hash(pair))}"
        model = write_language_model(folder / "lm", pair.text, **pair.text_config)
        out = folder / "out"
        tower = scratch / pair.tower
        return model, build_llava(out, llm=folder / "lm", vision_tower=tower, **pair.settings)

    return build


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return Original().write_tower(tmp_path / "clip")


@pytest.mark.parametrize("pair", PAIRS)
def test_text_is_read_as_the_language_model_reads_it_and_images_too(pair: str, built: Any) -> None:
    model, folder = built(PAIRS[pair])
    loaded = load(folder)
    text = loaded.encode("what is it?")
    both = loaded.encode(
        "see <image>\nand <image>?", [make_image(), make_image(1, width=90, height=30)]
    )
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(**text).logits
        found = loaded.model(**text).logits[..., : expected.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert torch.equal(plain(**both).logits, loaded.model(**both).logits)


@pytest.mark.parametrize("pair", ["llama", "mistral, anyres", "gemma3_text", "gpt_neox"])
def test_what_is_built_is_served_by_our_engine(pair: str, built: Any) -> None:
    assert_served_as_generated(load(built(PAIRS[pair])[1]))


@pytest.mark.parametrize("pair", ["tied, siglip, pad, linear", "mistral, anyres"])
def test_what_is_built_learns(pair: str, built: Any) -> None:
    loaded = load(built(PAIRS[pair])[1])
    loaded.model.train().requires_grad_(False)
    projector = loaded.model.model.multi_modal_projector.requires_grad_(True)
    inputs = loaded.encode("<image> a red square", [make_image()])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == loaded.image_token_id, -100)
    optimizer = torch.optim.Adam(projector.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = loaded.model(**inputs, labels=labels).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in projector.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_rows_for_the_image_token_are_the_mean_of_the_others(built: Any) -> None:
    model, folder = built(PAIRS["llama"])
    weights = load_file(folder / "model.safetensors")
    for name, old in {
        "language_model.model.embed_tokens.weight": model.get_input_embeddings().weight,
        "language_model.lm_head.weight": model.get_output_embeddings().weight,
    }.items():
        rows = weights[name]
        assert rows.shape[0] == 1024
        assert torch.equal(rows[: len(old)], old)
        torch.testing.assert_close(rows[len(old) :], old.mean(0).expand(1024 - len(old), -1))


def test_a_vocabulary_that_has_room_keeps_its_size(tmp_path: Path, clip: Path) -> None:
    model = write_language_model(tmp_path / "lm", rows=1000)
    folder = build_llava(tmp_path / "out", llm=tmp_path / "lm", vision_tower=clip)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["language_model.lm_head.weight"], model.lm_head.weight)
    assert load(folder).image_token_id == 961


def test_the_same_seed_builds_the_same_projector_and_another_another(
    tmp_path: Path, clip: Path
) -> None:
    write_language_model(tmp_path / "lm")
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        parts = {"llm": tmp_path / "lm", "vision_tower": clip}
        folder = build_llava(tmp_path / name, **parts, seed=seed, projector="linear")
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_the_language_models_own_chat_template_learns_of_images(tmp_path: Path, clip: Path) -> None:
    write_language_model(tmp_path / "lm", chat=CHAT)
    parts = {"llm": tmp_path / "lm", "vision_tower": clip}
    loaded = load(build_llava(tmp_path / "own", **parts))
    said = [Message("user", (ImagePart(b""), TextPart("what?")))]
    assert loaded.template.render(said) == "<s>[user]\n<image>\nwhat?</s>[assistant]\n"
    learned = loaded.template.encode(
        [*said, Message("assistant", (TextPart("yes"),))], loaded.tokenizer
    )
    assert loaded.tokenizer.decode([id_ for id_ in learned.labels if id_ >= 0]) == "yes</s>"
    named = load(build_llava(tmp_path / "named", **parts, template="vicuna_v1"))
    assert named.template.name == "vicuna_v1"
    assert named.template.render(said).endswith("USER: <image>\nwhat? ASSISTANT:")
    with pytest.raises(ConfigError, match="no conversation template 'vicuña_v1'"):
        build_llava(tmp_path / "x", **parts, template="vicuña_v1")


def test_answers_end_as_the_language_models_do(tmp_path: Path, clip: Path) -> None:
    write_language_model(tmp_path / "lm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "lm" / name
        file.write_text(file.read_text().replace("</s>", "<over>"))
    folder = build_llava(tmp_path / "out", llm=tmp_path / "lm", vision_tower=clip)
    loaded = load(folder)
    said = [Message("user", (TextPart("a"),)), Message("assistant", (TextPart("b"),))]
    text = loaded.template.render(said, add_generation_prompt=False)
    assert text.endswith("ASSISTANT: b<over>")
    assert loaded.eos_token_ids == {loaded.tokenizer.convert_tokens_to_ids("<over>")}


def test_a_built_model_is_exported_like_any_other(built: Any, tmp_path: Path) -> None:
    _, folder = built(PAIRS["mistral, anyres"])
    loaded = load(export_model(folder, tmp_path / "out", to="original"))
    inputs = loaded.encode("see <image>", [make_image()])
    with torch.inference_mode():
        assert torch.equal(
            loaded.model(**inputs).logits,
            load(folder).model(**load(folder).encode("see <image>", [make_image()])).logits,
        )
    with pytest.raises(ConfigError, match="does not support the language model 'qwen3'"):
        export_model(built(PAIRS["qwen3, class token"])[1], tmp_path / "qwen3", to="original")
    with pytest.raises(ConfigError, match="does not support GPT-NeoX as its language model"):
        export_model(built(PAIRS["gpt_neox"])[1], tmp_path / "neox", to="vllm")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gemma2", {}, "model_type 'gemma2' .it changes its logits after the output head"),
        ("granite", {"logits_scaling": 3.0}, "model_type 'granite'"),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "model_type 'gpt2'"),
        ("phi", {}, "has no output head that a LLaVA can use"),
    ],
)
def test_a_language_model_that_a_llava_would_change_is_refused(
    kind: str, settings: dict[str, Any], message: str, tmp_path: Path, clip: Path
) -> None:
    write_language_model(tmp_path / "lm", kind, **settings)
    with pytest.raises(ConfigError, match=message):
        build_llava(tmp_path / "out", llm=tmp_path / "lm", vision_tower=clip)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "lm"]


def test_parts_that_do_not_fit_are_told(tmp_path: Path, clip: Path, built: Any) -> None:
    write_language_model(tmp_path / "lm")
    parts: dict[str, Any] = {"llm": tmp_path / "lm", "vision_tower": clip}
    for change, message in (
        ({"projector": "mlp3x_gelu"}, "projector='mlp3x_gelu': .* use mlp2x_gelu, linear"),
        ({"projector": "identity"}, "features have size 16 and .* embeddings 32"),
        ({"select_layer": -9}, r"has 3 layers, so its hidden states are numbered -4 to 3"),
        ({"image_aspect": "anyres", "select_feature": "cls_patch"}, "grid of anyres; use patch"),
        ({"llm": clip}, "'clip_vision_model', which is not a language model that continues"),
        ({"vision_tower": tmp_path / "lm"}, "model_type 'llama': give a CLIP or SigLIP"),
        ({"llm": built(PAIRS["llama"])[1]}, "already has a vision tower"),
        ({"llm": "/no/such"}, "there is no such folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_llava(tmp_path / "out", **{**parts, **change})
    (clip / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"lacks preprocessor_config\.json"):
        build_llava(tmp_path / "out", **parts)
    weights = tmp_path / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"model\.safetensors does not load: it has .* bytes"):
        build_llava(tmp_path / "out", **parts)
    assert not (tmp_path / "out").exists()
