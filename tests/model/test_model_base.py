"""Checkpoints over a base: projectors, LoRA, other adapters, deltas, and the wrong base."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ray.errors import ConfigError, MissingPackageError
from llava_ray.model.loading import load_model
from tests.support.llava_checkpoints import Original, write_tensors
from tests.support.partial_checkpoints import (
    ALPHA,
    RANK,
    add_lora,
    make_lora,
    write_adapter,
    write_lora,
    write_projector_only,
)
from tests.support.reference_logits import assert_same_logits, load
from tests.support.tiny_checkpoint import make_image, tiny_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the language model below the checkpoint."""
    return Original().write_lm(tmp_path / "base")


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_a_projector_alone_is_loaded_over_its_language_model(projector, tmp_path, base):
    original = Original(projector=projector)
    folder = write_projector_only(original, tmp_path / "projector")
    assert_same_logits(load(folder, base=base), original)


def test_a_projector_alone_without_the_end_of_rows_is_told_why(tmp_path, base):
    original = Original(aspect="anyres", merge="spatial_unpad")
    folder = write_projector_only(original, tmp_path / "projector")
    assert_same_logits(load(folder, base=base), original)
    tensors = torch.load(folder / "mm_projector.bin")
    del tensors["model.image_newline"]
    torch.save(tensors, folder / "mm_projector.bin")
    with pytest.raises(ConfigError, match=r"image_newline\): LLaVA's trainer leaves it out"):
        load(folder, base=base)


def test_a_projector_alone_asks_for_its_base(tmp_path):
    folder = write_projector_only(Original(), tmp_path / "projector")
    with pytest.raises(ConfigError, match="holds only a projector: give the language model"):
        load(folder)


def test_a_lora_is_merged_with_what_was_trained_beside_it(tmp_path, base):
    original = Original()
    loaded = load(write_lora(original, tmp_path / "adapter"), base=base)
    assert_same_logits(loaded, add_lora(Original()))
    assert not [name for name, _ in loaded.model.named_modules() if "lora" in name]


def test_a_lora_over_a_whole_llava_keeps_its_tower(tmp_path):
    whole = Original().write(tmp_path / "whole")
    folder = write_lora(Original(), tmp_path / "adapter", base_model_name_or_path=str(whole))
    (folder / "non_lora_trainables.bin").unlink()
    assert_same_logits(load(folder), add_lora(Original()))


def test_scales_of_other_kinds_of_lora_are_kept(tmp_path, base):
    folder = write_lora(Original(), tmp_path / "adapter", use_rslora=True)
    assert_same_logits(load(folder, base=base), add_lora(Original(), ALPHA / math.sqrt(RANK)))


def test_any_adapter_is_loaded_over_a_whole_llava(tmp_path):
    whole = Original(aspect="anyres", merge="spatial_unpad").write(tmp_path / "whole")
    folder = write_adapter(tmp_path / "adapter", make_lora(Original()), str(whole))
    expected = add_lora(Original(aspect="anyres", merge="spatial_unpad"))
    assert_same_logits(load(folder), expected)


def test_an_adapter_that_peft_trained_over_transformers_own_llava_is_loaded(tmp_path):
    import peft

    plain = load(tiny_model())
    inputs = plain.encode("<image> what?", [make_image()])
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(plain.model, config).eval()  # the tower has such modules too
    with torch.inference_mode():
        expected = trained(**inputs).logits
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = load(tmp_path / "adapter", base=tiny_model())
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert loaded.checkpoint.kind == "adapter"


def test_an_adapter_that_changes_no_logits_is_an_error(tmp_path, base):
    tensors = make_lora(Original())
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
    folder = write_lora(Original(), tmp_path / "adapter", tensors)
    with pytest.raises(ConfigError, match="changes no logits: its weights are all zero"):
        load(folder, base=base)


@pytest.mark.parametrize("change", ["a module", "a size"])
def test_an_adapter_for_another_base_is_an_error_that_names_the_right_one(change, tmp_path, base):
    tensors = make_lora(Original())
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    if change == "a module":
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
    else:
        tensors[name] = torch.zeros(RANK, 48)
    folder = write_lora(Original(), tmp_path / "adapter", tensors)
    with pytest.raises(
        ConfigError, match=r"trained on another model; give that \('the/base', says"
    ):
        load(folder, base=base)


def test_a_lora_without_its_projector_is_told_with_the_file_that_is_missing(tmp_path, base):
    folder = write_lora(Original(), tmp_path / "adapter")
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(ConfigError, match=r"lack .*multi_modal_projector.*non_lora_trainables.bin"):
        load(folder, base=base)


def test_an_adapter_names_its_base_and_tells_when_that_is_not_here(tmp_path):
    folder = write_adapter(tmp_path / "adapter", make_lora(Original()), "/no/such/base")
    with pytest.raises(ConfigError, match=r"the base '/no/such/base' of .* was not found"):
        load(folder)


def test_an_adapter_of_another_kind_is_refused(tmp_path, base):
    folder = write_lora(Original(), tmp_path / "adapter", peft_type="IA3")
    with pytest.raises(ConfigError, match="peft_type 'IA3' adapters are not supported: use LoRA"):
        load(folder, base=base)


def test_an_adapter_without_peft_names_the_extra(tmp_path, base, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)  # as if it were not installed
    folder = write_lora(Original(), tmp_path / "adapter")
    with pytest.raises(MissingPackageError, match=r"pip install 'llava-ray\[train\]'"):
        load(folder, base=base)


def write_delta(original: Original, base: Path, folder: Path) -> Path:
    """Weights minus the base's, as LLaVA's `make_delta` leaves them; the base knows fewer words."""
    original.write(folder)
    below = load_file(base / "model.safetensors")
    cut = {"model.embed_tokens.weight": -5, "lm_head.weight": -5}
    below = {name: tensor[: cut.get(name)].clone() for name, tensor in below.items()}
    save_file(below, base / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in below.items():
        tensors[name][: len(tensor)] -= tensor
    write_tensors(folder, tensors)
    return folder


def test_a_delta_is_added_to_its_base(tmp_path, base):
    original = Original()
    changed = Original()
    with torch.no_grad():
        for name, parameter in changed.lm.named_parameters():
            if "norm" not in name:
                parameter += 0.1
    folder = write_delta(changed, base, tmp_path / "delta")
    loaded = load(folder, base=base)
    assert loaded.checkpoint.kind == "delta"
    assert_same_logits(loaded, changed)
    assert not torch.equal(changed.lm.lm_head.weight, original.lm.lm_head.weight)


def test_a_delta_is_added_to_its_base_however_much_was_trained(tmp_path, base):
    changed = Original()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in changed.lm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    folder = write_delta(changed, base, tmp_path / "delta")
    assert_same_logits(load(folder, base=base), changed)


def test_a_delta_does_not_change_the_tower(tmp_path, base):
    original = Original(extra={"unfreeze_mm_vision_tower": True})
    folder = write_delta(original, base, tmp_path / "delta")
    original.write_tower(tmp_path / "the-tower")
    assert_same_logits(load(folder, base=base), original)


def test_a_delta_without_its_base_and_a_base_without_a_delta_are_told(tmp_path, base):
    whole = Original().write(tmp_path / "whole")
    with pytest.raises(ConfigError, match="has full weights, not a delta: leave base out"):
        load(whole, base=base)
    delta = write_delta(Original(), base, tmp_path / "delta")
    with pytest.raises(ConfigError, match="look like a delta"):
        load(delta)


def test_a_base_that_would_change_nothing_is_refused(base):
    with pytest.raises(ConfigError, match="would have no effect: leave base out"):
        load_model(tiny_model(), base=base)
