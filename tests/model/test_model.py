"""Loading: what a folder must hold, what a prompt becomes, and how mistakes are told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_ray.errors import ConfigError, RequestError
from llava_ray.model.build.random_model import TINY, build_random_model
from llava_ray.model.loading import load_model, load_opened
from llava_ray.model.open_checkpoint import open_checkpoint
from llava_ray.types import ImagePart, Message, TextPart
from tests.support.tiny_checkpoint import make_image, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "model"))


def test_a_prompt_becomes_ids_with_as_many_image_tokens_as_the_model_makes():
    loaded = load_model(tiny_model(), dtype="float32", device="cpu")
    inputs = loaded.encode("<image> and <image>?", [make_image(), make_image(1, width=90)])
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(loaded.image_token_id) == 2 * TINY.num_image_tokens
    assert ids[0] == loaded.tokenizer.bos_token_id
    assert inputs["pixel_values"].shape == (2, 3, TINY.image_size, TINY.image_size)
    with torch.inference_mode():
        assert loaded.model(**inputs).logits.shape[1] == len(ids)


def test_a_checkpoint_is_opened_once():
    opened = open_checkpoint(tiny_model())
    loaded = load_opened(opened, device="cpu")
    assert loaded.checkpoint is opened.checkpoint
    assert loaded.processor is opened.processor
    assert loaded.template is opened.template
    assert loaded.context_length == opened.context_length == TINY.context_length


def test_a_wrong_template_is_refused_before_a_checkpoint_is_looked_for():
    with pytest.raises(ConfigError, match=r"template='nope': .*Known are"):
        open_checkpoint("/no/such/folder", template="nope")


def test_a_beginning_that_the_template_wrote_is_not_doubled():
    loaded = load_model(tiny_model(), dtype="float32", device="cpu")
    plain, written = loaded.encode("hello"), loaded.encode("<s>hello")
    assert plain["input_ids"].tolist() == written["input_ids"].tolist()
    assert "pixel_values" not in plain


def test_the_template_of_the_checkpoint_renders_conversations():
    loaded = load_model(tiny_model(), dtype="float32", device="cpu")
    image_and_text = (ImagePart(b""), TextPart("what is <image>?"))
    text = loaded.template.render([Message("user", image_and_text)])
    assert text == "USER: <image>\nwhat is < image>?\nASSISTANT:"


def test_the_number_of_images_must_be_the_number_of_places_for_them():
    loaded = load_model(tiny_model(), dtype="float32", device="cpu")
    with pytest.raises(RequestError, match="names 2 images and 1 came with it"):
        loaded.encode("<image><image>", [make_image()])


def test_what_is_loaded_has_the_precision_and_the_limits_asked_for():
    loaded = load_model(tiny_model(), device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.context_length == TINY.context_length
    assert loaded.eos_token_ids == {loaded.tokenizer.eos_token_id}
    assert not loaded.model.training


def test_loading_says_nothing_on_the_terminal(capfd, caplog):
    load_model(tiny_model(), device="cpu")
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


def test_the_same_seed_builds_the_same_weights(tmp_path):
    again = build_random_model(tmp_path / "again")
    name = "model.safetensors"
    assert (again / name).read_bytes() == (tiny_model() / name).read_bytes()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "is not a checkpoint, it has no config.json: give the folder"),
        ("model.safetensors", "lacks its weights"),
        ("tokenizer.json", "lacks its tokenizer"),
        ("processor_config.json", "lacks its image preprocessing"),
    ],
)
def test_a_missing_file_is_named(folder, lost, message):
    (folder / lost).unlink()
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 weight files .model-2\.safetensors."):
        load_model(folder)


def test_a_folder_that_is_not_there_is_told_with_what_to_do():
    with pytest.raises(ConfigError, match=r"'/no/such': there is no such folder; .* 'demo' for"):
        load_model("/no/such")


def test_another_kind_of_model_is_refused_by_its_kind(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="has model_type 'bert'"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        load_model(folder)


def test_a_truncated_weight_file_is_told(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ConfigError,
        match=r"model\.safetensors does not load: it has .* bytes .*; download it again",
    ):
        load_model(folder, device="cpu")


def test_devices_and_precisions_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"torch sees .* GPUs here"):
        load_model(tiny_model(), device="cuda:99")
    with pytest.raises(ConfigError, match="not a device"):
        load_model(tiny_model(), device="abacus")
    with pytest.raises(ConfigError, match="dtype='float3' is not known"):
        load_model(tiny_model(), dtype="float3")


def test_a_hub_name_is_looked_for_in_the_hub_and_its_absence_is_told(tmp_path: Path) -> None:
    # In a process of its own: the hub's library reads the environment when it is imported.
    module = "llava_ray.model.checkpoint.locate"
    code = f"from {module} import find_folder; print(find_folder('some/model'))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}

    def find() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )

    assert (
        "'some/model' is not a local folder and could not be downloaded from the hub"
        in find().stderr
    )
    cached = tmp_path / "models--some--model" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert find().stdout.strip() == str(cached)
