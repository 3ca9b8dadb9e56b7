"""Every tensor of a checkpoint is used, harmless, or an error that `doctor` tells as well."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ray.errors import ConfigError
from llava_ray.model.doctor import diagnose
from llava_ray.model.export.export import export_model
from tests.support.hf_checkpoints import write_published
from tests.support.llava_checkpoints import Original
from tests.support.reference_logits import assert_same_logits, load
from tests.support.tiny_checkpoint import tiny_model

QUERY = "self_attn.q_proj.weight"


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    file.write_text(json.dumps(config))


def change_weights(folder: Path, *, add: dict[str, torch.Tensor], drop: str = "") -> None:
    file = folder / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if not (drop and n.endswith(drop))}
    save_file(tensors | add, file, metadata={"format": "pt"})


def refuse(folder: Path, **options: Any) -> str:
    """Return the message with which a checkpoint is refused; the doctor must have it too."""
    with pytest.raises(ConfigError) as caught:
        load(folder, **options)
    assert caught.value.message in diagnose(folder, **options).problems
    return caught.value.message


# ---- which language model it is ----


@pytest.mark.parametrize("model_type", ["llava", "qwen2", "llama", "llava_llama", "llava_qwen"])
def test_architectures_tell_the_language_model_before_model_type(
    model_type: str, tmp_path: Path
) -> None:
    original = Original(text="qwen2")
    folder = original.write(tmp_path / "model")
    change_config(folder, model_type=model_type, architectures=["LlavaQwenForCausalLM"])
    assert not diagnose(folder).problems
    assert_same_logits(load(folder), original)


@pytest.mark.parametrize("model_type", ["llava", "llama", "llava_llama", "llava_mistral"])
def test_biases_that_the_named_language_model_lacks_are_told(
    model_type: str, tmp_path: Path
) -> None:
    folder = Original(text="qwen2").write(tmp_path / "model")
    change_config(folder, model_type=model_type, architectures=None)
    message = refuse(folder)
    assert "6 tensors are none of the model" in message
    assert "self_attn.k_proj.bias" in message
    assert "architectures" in message


@pytest.mark.parametrize("name", ["LlavaMixtralForCausalLM", "LlavaQwenMoeForCausalLM"])
def test_a_language_model_that_is_not_supported_is_named(name: str, tmp_path: Path) -> None:
    folder = Original().write(tmp_path / "model")
    change_config(folder, architectures=[name])
    assert name in refuse(folder)


# ---- quantized weights ----


def _layer(folder: Path, ending: str = QUERY) -> tuple[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return next((n, t) for n, t in found.items() if n.endswith(ending) and "layers.0" in n)


def _make_fp8(folder: Path) -> dict[str, torch.Tensor]:
    name, weight = _layer(folder)
    return {
        name: weight.to(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.ones(1, 1),
    }


def _make_awq(folder: Path) -> dict[str, torch.Tensor]:
    name, _ = _layer(folder)
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": torch.zeros(32, 4, dtype=torch.int32),
        f"{stem}qzeros": torch.zeros(1, 4, dtype=torch.int32),
        f"{stem}scales": torch.ones(1, 32, dtype=torch.float16),
    }


def _make_compressed(folder: Path) -> dict[str, torch.Tensor]:
    name, _ = _layer(folder)
    return {
        f"{name}_packed": torch.zeros(32, 4, dtype=torch.int32),
        f"{name}_scale": torch.ones(32, 1),
        f"{name}_shape": torch.tensor([32, 32]),
    }


def _make_4bit(folder: Path) -> dict[str, torch.Tensor]:
    name, _ = _layer(folder)
    return {
        name: torch.zeros(512, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(16),
        f"{name}.quant_map": torch.ones(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8),
    }


def _make_8bit(folder: Path) -> dict[str, torch.Tensor]:
    name, weight = _layer(folder)
    return {
        name: torch.zeros_like(weight, dtype=torch.int8),
        name.replace("weight", "SCB"): torch.ones(32),
    }


QUANTIZED = {
    "fp8": (_make_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "awq": (_make_awq, {"quant_method": "awq", "bits": 4}),
    "gptq": (_make_awq, {"quant_method": "gptq", "bits": 4}),
    "compressed-tensors": (_make_compressed, {"quant_method": "compressed-tensors"}),
    "bitsandbytes, 4 bits": (_make_4bit, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes, 8 bits": (_make_8bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "not named"])
@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("layout", ["hf", "llava"])
def test_quantized_weights_are_refused_with_their_method_and_what_serves_them(
    layout: str, method: str, is_named: bool, tmp_path: Path
) -> None:
    make, config = QUANTIZED[method]
    folder = tmp_path / "model"
    if layout == "hf":
        write_published(folder, "llava_onevision")
    else:
        Original().write(folder)
    tensors = make(folder)
    name, _ = _layer(folder)
    change_weights(folder, add=tensors, drop="" if name in tensors else name)
    if is_named:
        change_config(folder, quantization_config=config)
    message = refuse(folder)
    assert "the weights are quantized" in message
    assert not is_named or method in message
    assert ("engine: vllm" in message) == (layout == "hf")
    assert "before they were quantized" in message
    with pytest.raises(ConfigError, match="the weights are quantized"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["hf", "llava"])
def test_a_quantization_that_is_left_over_after_merging_is_ignored_and_said(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if layout == "llava":
        folder = Original().write(tmp_path / "model")
        before = load(folder).model.state_dict()
    else:
        folder, model = write_published(tmp_path / "model", "llava_onevision")
        before = model.state_dict()
    left = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    change_config(folder, quantization_config=left)
    with caplog.at_level(logging.WARNING):
        loaded = load(folder)
    assert "quantization_config (bitsandbytes, 4 bits) is left over" in caplog.text
    found = diagnose(folder)
    assert not found.problems
    assert "left over" in found.facts["quantization"]
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, before[name].float()), name
    out = export_model(folder, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


# ---- one tensor more, fewer, or of another shape ----


@pytest.mark.parametrize("layout", ["hf", "llava"])
@pytest.mark.parametrize("seed", range(6))
def test_a_tensor_more_or_fewer_or_misshapen_is_always_told(
    layout: str, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{layout} {seed}")
    folder = tmp_path / "model"
    if layout == "hf":
        write_published(folder, rng.choice(["llava", "llava_next", "llava_onevision"]))
    else:
        Original(text=rng.choice(["llama", "qwen2", "mistral"])).write(folder)
    whole = load_file(folder / "model.safetensors")
    assert not diagnose(folder).problems
    # LLaVA never uses the end of a tower.
    names = sorted(n for n in whole if "post_layernorm" not in n and ".head." not in n)
    for _ in range(12):
        name = rng.choice(names)
        tensors = dict(whole)
        match rng.choice(["more", "fewer", "misshapen"]):
            case "more":
                part, _, last = name.rpartition(".")
                new = rng.choice([f"{name}_extra", f"{part}.q_norm.{last}", f"{part}2.{last}"])
                tensors[new] = torch.zeros(2)
            case "fewer":
                del tensors[name]
            case "misshapen":
                tensors[name] = torch.zeros(*whole[name].shape, 1)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert refuse(folder)


def test_harmless_tensors_are_passed_over(tmp_path: Path) -> None:
    folder = tiny_model()
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(4),
        "image_newline": torch.zeros(8),
    }
    change_weights(copy, add=extra)
    assert not diagnose(copy).problems
    assert load(copy).model


# ---- files that are not what their names say ----


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_told_for_what_it_is(name: str, tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", "llava")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / name).write_text(pointer)
    message = refuse(folder)
    assert f"{name} is a Git LFS pointer" in message
    assert "git lfs pull" in message


def test_an_index_that_is_left_over_beside_whole_weights_is_passed_over(tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", "llava")
    stale = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert not diagnose(folder).problems
    assert load(folder).model
    (folder / "model.safetensors").unlink()
    assert "lacks 1 of 1 weight files" in refuse(folder)
