"""transformers' own LLaVAs: loaded, they give what transformers gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.tensor_names import from_memory
from llava_ray.model.loading import load_model
from tests.support.hf_checkpoints import write_published
from tests.support.tiny_checkpoint import make_image

PROMPT = "<s>see <image>\nand <image> what?"


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder, model = write_published(tmp_path / "model", kind)
    loaded = load_model(folder, dtype="float32", device="cpu")
    assert type(loaded.model) is type(model)
    inputs = loaded.encode(PROMPT, [make_image(), make_image(1, width=31, height=97)])
    with torch.inference_mode():
        expected = model(**inputs).logits
        torch.testing.assert_close(loaded.model(**inputs).logits, expected)


def test_an_image_of_onevision_is_scaled_down_to_its_limit_of_tiles(tmp_path: Path) -> None:
    folder, model = write_published(tmp_path / "model", "llava_onevision")
    loaded = load_model(folder, dtype="float32", device="cpu")
    inputs = loaded.encode("<image>", [make_image(width=60, height=60)])
    with torch.inference_mode():
        model(**inputs)  # compares the number of ids and of features itself
    num_tokens = inputs["input_ids"][0].tolist().count(loaded.image_token_id)
    assert num_tokens < 16 + 8 * 9  # of the four tiles' 8 x 8 patches fewer are left


def test_names_as_they_were_published_are_read(tmp_path: Path) -> None:
    folder, model = write_published(tmp_path / "model", "llava_next")
    tensors = {
        from_memory(name, "hf"): tensor.clone() for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    assert "language_model.model.norm.weight" in load_file(folder / "model.safetensors")
    loaded = load_model(folder, dtype="float32", device="cpu")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_tokenizer_without_the_image_token_is_told(tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", "llava")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<image>", "<nothing>"))
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<image>", "<nothing>"))
    with pytest.raises(ConfigError, match="lacks the image token '<image>', which"):
        load_model(folder, device="cpu")


def test_an_image_token_with_another_id_is_told(tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", "llava")
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"at \d+, and config.json \(image_token_index\) at 7"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, r"has shape \[\d+, 32\], and .*config.json needs \[\d+, 48\]"),
        ({"num_hidden_layers": 3}, "the weights of .* lack 9 tensors"),
        ({"hidden_size": "many"}, r"config\.json does not describe a model that can be built"),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_the_file(change, message, tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", "llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load_model(folder, device="cpu")


def test_a_prompt_of_several_turns_is_encoded_as_transformers_does(tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", "llava")
    loaded = load_model(folder, device="cpu")
    text = "USER: <image>\nhello ASSISTANT: yes</s>USER: <image> more"
    expected = loaded.processor(
        text=text, images=[make_image(), make_image(1)], return_tensors="pt"
    )
    inputs = loaded.encode(text, [make_image(), make_image(1)])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
