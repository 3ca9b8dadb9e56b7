"""Export: what is written is read by transformers and by us, with the same ids and logits."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

from llava_ray.errors import ConfigError
from llava_ray.model.export.export import export_model
from llava_ray.model.loading import LoadedModel
from llava_ray.types import ImagePart, Message, TextPart
from tests.support.hf_checkpoints import write_published
from tests.support.llava_checkpoints import Original, write_tensors
from tests.support.partial_checkpoints import add_lora, write_lora, write_projector_only
from tests.support.reference_logits import GOLDEN, KINDS, PROMPT, assert_same_logits, images, load
from tests.support.tiny_checkpoint import make_image, tiny_model

NOT_IN_HF = {
    "three-layer projector": "a projector of two layers, and this one is mlp3x_gelu",
    "mpt": "does not support MPT",
    "anyres, flat": "joins tiles by spatial_unpad, and this checkpoint by flat",
    "anyres, flat, class token": "this checkpoint by flat",
    "anyres, spatial": r"this checkpoint by spatial \(mm_patch",
    "anyres, unpad, mpt, linear": "does not support MPT",
    "NeXT, square, unpad": "puts no newline behind an image",
    "NeXT, pad, unpad, qwen2": "puts no newline behind an image",
}
IN_HF = [kind for kind in KINDS if kind not in NOT_IN_HF]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the folder of an original checkpoint by its kind, written once."""
    scratch = tmp_path_factory.mktemp("sources")

    @cache
    def write(kind: str) -> Path:
        folder = scratch / kind.replace(", ", "-").replace(" ", "-")
        return KINDS[kind].write(folder / "model")

    return write


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@torch.inference_mode()
def compute(loaded: LoadedModel, text: str = PROMPT) -> tuple[list[int], torch.Tensor]:
    inputs = loaded.encode(text, images()[: text.count("<image>")])
    return inputs["input_ids"][0].tolist(), loaded.model(**inputs).logits[0]


@pytest.mark.parametrize("kind", IN_HF)
def test_hf_gives_the_ids_and_the_logits_of_the_original(
    kind: str, sources: Any, tmp_path: Path
) -> None:
    before = load(sources(kind))
    loaded = load(export_model(sources(kind), tmp_path / "out", to="hf"))
    (ids, logits), (expected_ids, expected) = compute(loaded), compute(before)
    assert ids == expected_ids
    assert torch.equal(logits[:, : expected.shape[1]], expected)
    if rows := logits.shape[1] - expected.shape[1]:  # added for the image token
        assert logits.shape[1] % 64 == 0
        assert (logits[:, -rows:].max(1).values <= expected.max(1).values).all()


@pytest.mark.parametrize("kind", ["llama, square", "linear projector", "siglip", "anyres, unpad"])
def test_hf_is_whole_to_transformers_and_has_the_published_names(
    kind: str, sources: Any, tmp_path: Path
) -> None:
    folder = export_model(sources(kind), tmp_path / "out", to="hf")
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    loaded = load(folder)
    inputs = loaded.encode(PROMPT, images())
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, loaded.model(**inputs).logits)
    names = read_weights(folder)
    for prefix in (
        "vision_tower.vision_model.embeddings.",
        "language_model.model.layers.1.",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_2.",
    ):
        assert [name for name in names if name.startswith(prefix)]
    assert ("image_newline" in names) == (kind == "anyres, unpad")


@pytest.mark.parametrize("kind", NOT_IN_HF)
def test_what_transformers_cannot_hold_is_told_with_the_form_that_can(
    kind: str, sources: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"{NOT_IN_HF[kind]}.*use --to original"):
        export_model(sources(kind), tmp_path / "out", to="hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_original_gives_the_logits_of_the_reference_wherever_it_is_moved(
    kind: str, sources: Any, tmp_path: Path
) -> None:
    export_model(sources(kind), tmp_path / "out", to="original")
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert_same_logits(load(moved), KINDS[kind])


def test_original_has_its_tower_as_a_checkpoint_that_transformers_reads(
    sources: Any, tmp_path: Path
) -> None:
    folder = export_model(sources("pad"), tmp_path / "out", to="original")
    config = json.loads((folder / "config.json").read_text())
    tower = Path(config["mm_vision_tower"])
    assert tower.parent == folder
    model, report = CLIPVisionModel.from_pretrained(tower, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in KINDS["pad"].vision.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    names = set(read_weights(folder))
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias"} <= names
    assert "model.vision_tower.vision_tower.vision_model.post_layernorm.bias" in names
    assert config["image_aspect_ratio"] == "pad"
    assert config["rope_theta"] == 10000.0
    assert not {"text_config", "vision_config", "rope_parameters"} & set(config)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_there_and_back_again_no_bit_has_changed(kind: str, tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", kind)
    first = export_model(folder, tmp_path / "first", to="hf")
    original = export_model(first, tmp_path / "original", to="original", max_shard_size="40KB")
    again = export_model(original, tmp_path / "again", to="hf")
    weights, expected = read_weights(again), read_weights(first)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    ids, logits = compute(load(folder))
    for form in (first, original, again):
        found_ids, found = compute(load(form))
        assert found_ids == ids
        assert torch.equal(found, logits)


@pytest.mark.parametrize("kind", ["linear projector", "no projector"])
def test_a_projector_of_fewer_layers_comes_back_as_it_was(
    kind: str, sources: Any, tmp_path: Path
) -> None:
    hf = export_model(sources(kind), tmp_path / "hf", to="hf")
    back = export_model(hf, tmp_path / "back", to="original")
    config = json.loads((back / "config.json").read_text())
    assert config["mm_projector_type"] == KINDS[kind].projector
    expected = compute(load(sources(kind)))[1]
    assert torch.equal(compute(load(back))[1][:, : expected.shape[1]], expected)


def test_a_projector_without_activation_is_written_in_vllms_words(
    sources: Any, tmp_path: Path
) -> None:
    folder = export_model(sources("linear projector"), tmp_path / "out", to="vllm")
    config = json.loads((folder / "config.json").read_text())
    assert config["projector_hidden_act"] == "torch.nn.modules.linear.Identity"
    expected = compute(load(sources("linear projector")))[1]
    assert torch.equal(compute(load(folder))[1][:, : expected.shape[1]], expected)
    same = [export_model(tiny_model(), tmp_path / form, to=form) for form in ("vllm", "hf")]
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in same]
    assert files[0] == files[1]


def test_onevision_is_written_anew_and_told_that_llava_has_no_such_thing(tmp_path: Path) -> None:
    folder, model = write_published(tmp_path / "model", "llava_onevision")
    loaded = load(export_model(folder, tmp_path / "out"))
    inputs = loaded.encode("<s>see <image>", [make_image()])
    with torch.inference_mode():
        assert torch.equal(loaded.model(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ConfigError, match="does not support LLaVA-OneVision: use --to hf"):
        export_model(folder, tmp_path / "original", to="original")


@pytest.mark.parametrize("form", ["hf", "original"])
def test_a_lora_is_merged_into_what_is_written(form: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = Original().write_lm(tmp_path / "base")
    adapter = write_lora(Original(), tmp_path / "adapter")
    folder = export_model(adapter, tmp_path / "out", to=form, base=base)
    expected = add_lora(Original()).logits(PROMPT, images())
    logits = compute(load(folder))[1][:, : expected.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert not [name for name in read_weights(folder) if "lora" in name]


def test_a_projector_is_taken_out_and_loads_over_its_language_model(
    sources: Any, tmp_path: Path
) -> None:
    base = KINDS["anyres, unpad"].write_lm(tmp_path / "base")
    folder = export_model(sources("anyres, unpad"), tmp_path / "out", to="projector")
    held = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert {"model.mm_projector.0.weight", "model.image_newline"} <= set(held)
    assert not [name for name in held if "layers" in name or "vision" in name]
    assert_same_logits(load(folder, base=base), KINDS["anyres, unpad"])
    with pytest.raises(ConfigError, match="whose embeddings a projector does not contain"):
        export_model(sources("between marks"), tmp_path / "marks", to="projector")


def test_a_projector_over_a_base_becomes_a_whole_checkpoint(tmp_path: Path) -> None:
    base = Original().write_lm(tmp_path / "base")
    folder = write_projector_only(Original(), tmp_path / "projector")
    whole = export_model(folder, tmp_path / "whole", base=base)
    assert_same_logits(load(whole), Original())


def test_the_tower_may_be_named_instead_of_written(sources: Any, tmp_path: Path) -> None:
    folder = export_model(
        sources("pad"), tmp_path / "out", to="original", tower_name="openai/clip-tiny"
    )
    assert json.loads((folder / "config.json").read_text())["mm_vision_tower"] == "openai/clip-tiny"
    assert not [path for path in folder.iterdir() if path.is_dir()]
    tower = sources("pad").parent / "the-tower"
    assert_same_logits(load(folder, vision_tower=tower), KINDS["pad"])
    with pytest.raises(ConfigError, match="leave --tower-name out"):
        export_model(sources("pad"), tmp_path / "hf", to="hf", tower_name="openai/clip-tiny")


def test_shards_are_as_large_as_asked_for_and_listed(tmp_path: Path) -> None:
    folder = export_model(tiny_model(), tmp_path / "out", max_shard_size="200KB", dtype="bfloat16")
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = read_weights(folder)
    assert len(files) > 2
    assert all(file.stat().st_size < 210_000 for file in files)
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_chat_template_writes_what_we_write_for_every_reader(
    sources: Any, tmp_path: Path
) -> None:
    for kind in ("llama, square", "between marks", "mistral", "qwen2"):
        before = load(sources(kind))
        folder = export_model(sources(kind), tmp_path / kind, to="hf")
        text = before.template.render([Message("user", (ImagePart(b""), TextPart("what?")))])
        asked = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
        ]
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        written = processor.apply_chat_template(asked, add_generation_prompt=True)
        assert written == before.tokenizer.bos_token + text
        loaded = load(folder)
        assert loaded.template.render([Message("user", (TextPart("hi"),))]).endswith(
            before.template.render([Message("user", (TextPart("hi"),))])
        )
        assert compute(loaded, written)[0] == compute(before, text)[0]


@pytest.mark.parametrize("form", ["hf", "original"])
def test_a_tower_that_is_kept_in_more_precision_than_the_rest_loses_none(
    form: Any, tmp_path: Path
) -> None:
    folder = Original().write(tmp_path / "model", tower_inside=False)
    halved = {n: t.half() for n, t in read_weights(folder).items()}
    write_tensors(folder, halved)
    out = export_model(folder, tmp_path / "out", to=form)
    expected = compute(load(folder))[1]
    assert torch.equal(compute(load(out))[1][:, : expected.shape[1]], expected)
    kinds = {n.split("vision")[0]: t.dtype for n, t in read_weights(out).items()}
    assert {torch.float16, torch.float32} == set(kinds.values())
    same = export_model(folder, tmp_path / "same", to=form, dtype="float16")
    assert {tensor.dtype for tensor in read_weights(same).values()} == {torch.float16}


def test_answers_are_the_same_before_and_after(sources: Any, tmp_path: Path) -> None:
    def answer(folder: Path) -> list[int]:
        loaded = load(folder)
        inputs = loaded.encode(PROMPT, images())
        length = inputs["input_ids"].shape[1]
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        return loaded.model.generate(**inputs, **settings)[0, length:].tolist()

    for kind in ("pad", "anyres, unpad"):
        expected = answer(sources(kind))
        for form in ("hf", "original"):
            assert answer(export_model(sources(kind), tmp_path / kind / form, to=form)) == expected


@pytest.mark.parametrize("case", ["llava-v1.5-pad", "llava-v1-linear-square"])
def test_golden_prompts_have_the_ids_of_the_original_code_after_export(
    case: str, tmp_path: Path
) -> None:
    checkpoint, tower = GOLDEN / case / "checkpoint", GOLDEN / "openai-clip-micro"
    before = load(checkpoint, vision_tower=tower)
    loaded = load(export_model(checkpoint, tmp_path / "out", to="hf", vision_tower=tower))
    for record in json.loads((GOLDEN / case / "golden.json").read_text())["records"]:
        images = [Image.open(GOLDEN / case / name).convert("RGB") for name in record["images"]]
        found, expected = (c.encode(record["prompt"], images) for c in (loaded, before))
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()
        if images:
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
