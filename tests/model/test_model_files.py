"""Bad files, clouds, memory, quantization and the doctor: what users meet around a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_ray.errors import ConfigError, MissingPackageError
from llava_ray.model.doctor import diagnose
from llava_ray.model.loading import load_model
from tests.support.llava_checkpoints import Original
from tests.support.reference_logits import assert_same_logits, load
from tests.support.tiny_checkpoint import make_image, tiny_model


class Harm:
    """What a hostile pickle would do when it is loaded."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["HARM"],))


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    folder = Original().write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"pytorch_model\.bin is a pickle that contains more than"
    ):
        load(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 cut off"])
def test_a_damaged_pickle_is_told(content, tmp_path):
    folder = Original().write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin (does not load|is a pickle)"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not a safetensors file|its header is damaged"),
        (b"\xff" * 64, "it is not a safetensors file"),
        ((8).to_bytes(8, "little") + b"{broken}", "its header is damaged"),
        ((2).to_bytes(8, "little") + b"[]", "its header is damaged"),
    ],
)
def test_damaged_safetensors_are_told(content, message, tmp_path):
    folder = Original().write(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"model\.safetensors does not load: ({message})"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"s2": True}, r"S2 vision towers \(s2=true\) are not supported"),
        ({"mm_projector_type": "resampler"}, "unknown projector type 'resampler'"),
        ({"image_aspect_ratio": "round"}, "image_aspect_ratio='round' is not known"),
        ({"mm_patch_merge_type": "heap"}, "mm_patch_merge_type='heap' is not known"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature='cls'"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints=None is not a list|is empty"),
        ({"mm_vision_tower": None}, "names no vision tower"),
        ({"mm_vision_tower": "nowhere"}, "names the vision tower 'nowhere', which was not found"),
        ({"mm_projector_type": "mlp3x_gelu"}, "lack 2 tensors .*linear_3"),
        ({"hidden_size": 64}, r"has shape \[\d+, 32\], and .*config.json needs \[\d+, 64\]"),
        ({"rms_norm_eps": "small"}, r"config\.json does not describe a model that can be built"),
    ],
)
def test_a_configuration_that_cannot_be_loaded_is_told_by_its_field(fields, message, tmp_path):
    folder = Original().write(tmp_path / "model")
    change_config(folder, **fields)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_class_tokens_cannot_be_laid_out_on_a_grid(tmp_path):
    original = Original(aspect="anyres", merge="flat", feature="cls_patch")
    folder = original.write(tmp_path / "model")
    change_config(folder, mm_patch_merge_type="spatial_unpad")
    with pytest.raises(ConfigError, match="only mm_patch_merge_type=flat can join"):
        load(folder)


def test_a_tower_of_another_kind_is_refused(tmp_path):
    folder = Original().write(tmp_path / "model")
    change_config(tmp_path / "the-tower", model_type="dinov2")
    with pytest.raises(ConfigError, match="the vision tower has model_type 'dinov2'"):
        load(folder)


def test_the_name_of_a_folder_decides_nothing(tmp_path):
    original = Original()
    for name in ("mpt-mistral-lora-qlora", "x"):
        assert_same_logits(load(original.write(tmp_path / name)), original)


def test_a_checkpoint_in_a_cloud_is_copied_once_and_again_when_it_changes(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cloud = fsspec.filesystem("memory")
    cloud.put(f"{tiny_model()}/", "/bucket/model/", recursive=True)
    loaded = load_model("memory://bucket/model", device="cpu")
    assert loaded.encode("<image>", [make_image()])["pixel_values"].shape[0] == 1
    copies = tmp_path / "cache" / "llava_ray" / "checkpoints"
    assert [loaded.checkpoint.folder] == list(copies.iterdir())
    load_model("memory://bucket/model", device="cpu")
    assert len(list(copies.iterdir())) == 1
    cloud.pipe("/bucket/model/config.json", b"{}")
    with pytest.raises(ConfigError, match="has model_type None"):
        load_model("memory://bucket/model", device="cpu")
    assert len(list(copies.iterdir())) == 2


def test_a_cloud_folder_that_is_not_there_and_an_unknown_cloud_are_told():
    with pytest.raises(ConfigError, match="there is no folder at 'memory://bucket/nothing'"):
        load_model("memory://bucket/nothing")
    with pytest.raises(ConfigError, match="is not the address of a folder"):
        load_model("nimbus://bucket/model")
    with pytest.raises((MissingPackageError, ConfigError), match="adl://"):
        load_model("adl://bucket/model")


PEAK = """
import resource, sys
from llava_ray.model.loading import load_model
import transformers.models.llava.modeling_llava, transformers.models.clip.modeling_clip
from transformers import LlavaProcessor, CLIPImageProcessorPil, PreTrainedTokenizerFast
load_model(sys.argv[1], dtype="float32", device="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = load_model(sys.argv[2], dtype="float32", device="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    from llava_ray.model.build.random_model import Shape, build_random_model

    shape = Shape(
        hidden_size=512,
        num_layers=6,
        num_heads=8,
        num_kv_heads=8,
        mlp_size=2048,
        vision_hidden_size=64,
        vision_num_layers=2,
        vision_num_heads=2,
        image_size=32,
        patch_size=8,
        context_length=512,
    )
    folder = build_random_model(tmp_path / "model", shape)
    num_bytes = (folder / "model.safetensors").stat().st_size
    assert num_bytes > 100e6
    peak = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, tiny_model(), folder],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(peak.stdout) < 1.3 * num_bytes


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_weights_take_less_memory_and_give_similar_logits(quantization):
    plain = load_model(tiny_model(), device="cpu")
    loaded = load_model(tiny_model(), device="cpu", quantization=quantization)
    kinds = {type(module).__name__ for module in loaded.model.model.language_model.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    assert type(loaded.model.lm_head) is torch.nn.Linear
    inputs = loaded.encode("<image> what", [make_image()])
    with torch.inference_mode():
        found, expected = (model(**inputs).logits[0] for model in (loaded.model, plain.model))
    similarity = torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=-1)
    assert similarity.mean() > 0.9


def test_an_unknown_quantization_and_a_missing_package_are_told(monkeypatch):
    with pytest.raises(ConfigError, match="quantization='2bit' is not known"):
        load_model(tiny_model(), device="cpu", quantization="2bit")  # type: ignore[arg-type]
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(MissingPackageError, match=r"pip install 'llava-ray\[quant\]'"):
        load_model(tiny_model(), device="cpu", quantization="4bit")


def test_an_attention_that_is_not_installed_is_told():
    with pytest.raises((MissingPackageError, ConfigError), match="flash_attention_2"):
        load_model(tiny_model(), device="cpu", attention="flash_attention_2")


def test_the_doctor_says_what_a_checkpoint_is(tmp_path):
    original = Original(text="mistral", aspect="anyres", merge="spatial_unpad", start_end=True)
    found = diagnose(original.write(tmp_path / "model"))
    text = found.text()
    assert found.problems == []
    assert found.facts["kind"] == "a LLaVA with all its weights"
    for said in (
        "LLaVA's own",
        "language model mistral",
        "the-tower",
        "mlp2x_gelu",
        "anyres, tiles joined spatial_unpad, between <im_start> and <im_end>",
        "28 x 28 pixels in 16 patches",
        "512 tokens",
        "4bit",
        "no problems found",
    ):
        assert said in text


def test_the_doctor_names_each_problem_and_its_remedy(tmp_path):
    folder = Original(projector="mlp3x_gelu").write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    from tests.support.llava_checkpoints import write_tensors

    kept = {n: t for n, t in tensors.items() if "mm_projector" not in n and "tower" not in n}
    write_tensors(folder, kept | {"model.norm.weight": torch.ones(7)})
    (folder / "tokenizer.json").write_text("{")
    found = diagnose(folder)
    text = found.text()
    assert len(found.problems) == 4
    assert "give the tower's folder or hub name as vision_tower" in text
    assert "mm_projector.bin" in text
    assert "[7], and" in text
    assert "tokenizer" in text
    assert "no problems" not in text


def test_the_doctor_reads_no_weights(tmp_path):
    folder = Original().write(tmp_path / "model")
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    with file.open("r+b") as opened:  # the tensors become a hole in the file
        opened.truncate(header)
        opened.truncate(size)
    assert diagnose(folder).problems == []


def test_the_doctor_tells_a_folder_that_is_none():
    found = diagnose("/no/such")
    assert "there is no such folder" in found.problems[0]
    assert found.text().startswith("problem: ")
