"""Adapters that are incomplete or unusual are loaded right or refused, and doctor says the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ray.errors import ConfigError
from llava_ray.model.doctor import diagnose
from tests.support.llava_checkpoints import Original
from tests.support.partial_checkpoints import (
    ALPHA,
    RANK,
    make_lora,
    write_adapter,
    write_lora,
)
from tests.support.reference_logits import assert_same_logits, load

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The folder of the LLaVA below the adapter."""
    return Original().write(tmp_path / "whole")


def refuse(folder: Path, **options: Any) -> str:
    """Return the message with which an adapter is refused; the doctor must have it too."""
    with pytest.raises(ConfigError) as caught:
        load(folder, **options)
    assert caught.value.message in diagnose(folder, **options).problems
    return caught.value.message


def adapt(folder: Path, whole: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    return write_adapter(folder, tensors, str(whole), **settings)


def test_biases_of_low_rank_products_are_added_where_the_base_has_biases(tmp_path: Path) -> None:
    original = Original(text="qwen2")
    folder = original.write(tmp_path / "whole")
    tensors = {n: t for n, t in make_lora(original).items() if "q_proj" in n}
    for name in [n for n in tensors if "lora_B" in n]:
        bias = torch.randn(32, generator=torch.Generator().manual_seed(7))
        tensors[name.replace("weight", "bias")] = bias
        module = original.lm.get_submodule(name.partition(".lora_")[0])
        product = tensors[name] @ tensors[name.replace("lora_B", "lora_A")]
        with torch.no_grad():
            module.weight += ALPHA / RANK * product
            module.bias += ALPHA / RANK * bias
    adapted = adapt(tmp_path / "adapter", folder, tensors, lora_bias=True)
    assert not diagnose(adapted).problems
    assert_same_logits(load(adapted), original)


def test_biases_that_cannot_be_merged_are_told(tmp_path: Path, whole: Path) -> None:
    tensors = make_lora(Original()) | {f"{QUERY}.lora_B.bias": torch.ones(32)}
    message = refuse(adapt(tmp_path / "adapter", whole, tensors, lora_bias=True))
    assert "train it without lora_bias" in message


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_half_of_a_product_is_told(missing: str, tmp_path: Path, whole: Path) -> None:
    tensors = make_lora(Original())
    del tensors[f"{QUERY}.{missing}.weight"]
    message = refuse(adapt(tmp_path / "adapter", whole, tensors))
    assert f"without {missing} for 1 modules" in message
    assert "incomplete" in message


def test_weights_that_zero_3_did_not_gather_are_told(tmp_path: Path, whole: Path) -> None:
    tensors = make_lora(Original())
    tensors[f"{QUERY}.lora_B.weight"] = torch.zeros(0)
    message = refuse(adapt(tmp_path / "adapter", whole, tensors))
    assert "saved under ZeRO 3 without gathering" in message
    stored = load_file(whole / "model.safetensors")
    save_file(stored | {f"{QUERY}.weight": torch.zeros(0)}, whole / "model.safetensors")
    assert "saved under ZeRO 3 without gathering" in refuse(whole)


def test_embeddings_that_were_grown_are_taken_with_their_head(tmp_path: Path, whole: Path) -> None:
    original = Original()
    rows = original.lm.config.vocab_size + 3
    grown = {
        name: torch.randn(rows, 32, generator=torch.Generator().manual_seed(6))
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    folder = adapt(tmp_path / "adapter", whole, make_lora(original) | grown)
    assert not diagnose(folder).problems
    model = load(folder).model
    assert model.config.text_config.vocab_size == rows
    assert torch.equal(model.get_input_embeddings().weight, grown["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, grown["lm_head.weight"])
    del grown["lm_head.weight"]
    half = adapt(tmp_path / "half", whole, make_lora(original) | grown)
    assert "only one of them was saved" in refuse(half)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3' adapters are not supported"),
        ({"peft_type": "ADALORA"}, "'ADALORA' adapters are not supported"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
    ],
)
def test_what_is_not_supported_is_named(
    settings: dict[str, Any], said: str, tmp_path: Path, whole: Path
) -> None:
    folder = adapt(tmp_path / "adapter", whole, make_lora(Original()), **settings)
    message = refuse(folder)
    assert said in message
    assert "merge_and_unload" in message


def test_a_base_of_other_sizes_is_told_by_both(tmp_path: Path, whole: Path) -> None:
    tensors = {n: torch.cat([t, t], -1) for n, t in make_lora(Original()).items()}
    assert "was trained on another model" in refuse(adapt(tmp_path / "adapter", whole, tensors))


@pytest.mark.parametrize("write", [adapt, None], ids=["any adapter", "LLaVA's"])
def test_an_adapter_without_effect_is_told_by_both(write: Any, tmp_path: Path, whole: Path) -> None:
    tensors = make_lora(Original())
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
    if write:
        assert "changes no logits" in refuse(adapt(tmp_path / "adapter", whole, tensors))
        return
    folder = write_lora(Original(), tmp_path / "adapter", tensors)
    base = Original().write_lm(tmp_path / "base")
    assert "changes no logits" in refuse(folder, base=base)


# ---- the head of the whole model ----


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_a_head_that_is_not_tied_may_not_be_missing(text: str, tmp_path: Path) -> None:
    folder = Original(text=text).write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "lack 1 tensors (lm_head.weight)" in refuse(folder)


def test_a_head_that_is_tied_is_computed_from_the_embeddings(tmp_path: Path) -> None:
    original = Original(text="qwen2", extra={"tie_word_embeddings": True})
    original.lm.lm_head.weight = original.lm.model.embed_tokens.weight
    folder = original.write(tmp_path / "model")
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors")
    assert not diagnose(folder).problems
    assert_same_logits(load(folder), original)
