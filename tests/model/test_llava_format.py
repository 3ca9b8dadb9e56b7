"""LLaVA's own checkpoints: each kind gives the numbers of a reference that is computed by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.llava_checkpoints import Original
from tests.support.reference_logits import GOLDEN, KINDS, PROMPT, assert_same_logits, images, load
from tests.support.tiny_checkpoint import make_image

OF_THE_ORIGINAL = json.loads((GOLDEN / "original_logits.json").read_text())
"""What LLaVA's code at its last commit gave for these files, prompt and images in float32 (MPT's
forward mended): the first eight logits of the last position."""


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_reference(kind: str, tmp_path: Path) -> None:
    original = KINDS[kind]
    loaded = load(original.write(tmp_path / "any name"))
    assert_same_logits(loaded, original)


@pytest.mark.parametrize("kind", OF_THE_ORIGINAL)
def test_logits_are_those_of_the_original_code(kind: str, tmp_path: Path) -> None:
    loaded = load(KINDS[kind].write(tmp_path / "model"))
    with torch.inference_mode():
        found = loaded.model(**loaded.encode(PROMPT, images())).logits[0, -1, :8]
    torch.testing.assert_close(found, torch.tensor(OF_THE_ORIGINAL[kind]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["mpt", "anyres, unpad", "three-layer projector"])
def test_generation_continues_with_the_best_tokens_of_the_reference(
    kind: str, tmp_path: Path
) -> None:
    original = KINDS[kind]
    loaded = load(original.write(tmp_path / "model"))
    inputs = loaded.encode("<image> a", [make_image()])
    length = inputs["input_ids"].shape[1]
    out = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    text, best = "<image> a", []
    embed = original.lm.get_input_embeddings()
    with torch.inference_mode():
        first, second = original.ids(text)
        parts = [embed(torch.tensor(first)), original.features(make_image())]
        parts.append(embed(torch.tensor(second)))
        for _ in range(4):
            logits = original.lm(inputs_embeds=torch.cat(parts)[None]).logits[0, -1]
            best.append(int(logits.argmax()))
            parts.append(embed(torch.tensor(best[-1:])))
    assert out[0, length:].tolist() == best


@pytest.mark.parametrize("size", [(5, 200), (28, 28), (57, 55), (300, 100), (84, 28), (99, 33)])
def test_an_image_is_as_many_tokens_as_the_model_makes(size: tuple[int, int], tmp_path) -> None:
    original = Original(aspect="anyres", merge="spatial_unpad")
    loaded = load(original.write(tmp_path / "model"))
    image = make_image(width=size[0], height=size[1])
    inputs = loaded.encode("<image>", [image])
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(loaded.image_token_id) == len(original.features(image))
    with torch.inference_mode():
        loaded.model(**inputs)  # transformers itself compares ids and features


def test_an_image_that_is_marked_already_is_not_marked_twice(tmp_path: Path) -> None:
    loaded = load(Original(start_end=True).write(tmp_path / "model"))
    assert loaded.tokenize("a <im_start><image><im_end>") == loaded.tokenize("a <image>")
    start, end = (loaded.tokenizer.convert_tokens_to_ids(t) for t in ("<im_start>", "<im_end>"))
    assert loaded.tokenize("<image>")[-3:] == [start, -200, end]


def test_the_tower_may_lie_beside_the_checkpoint_with_its_weights(tmp_path: Path) -> None:
    original = Original()
    assert_same_logits(load(original.write(tmp_path / "a", tower_inside=False)), original)


FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "LLaVA 1.5": ({}, False),
    "LLaVA 1.6, of LLaVA's own code": ({"image_crop_resolution": 224}, False),
    "LLaVA's own code, tower trained": ({"unfreeze_mm_vision_tower": True}, True),
    "LLaVA-NeXT, tower trained": ({"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}, True),
    "LLaVA-NeXT, tower frozen": ({"mm_tunable_parts": "mm_mlp_adapter"}, True),
    "LLaVA-NeXT, nothing set": ({"mm_tunable_parts": None, "mm_newline_position": "grid"}, True),
    "LLaVA-NeXT, told by a null": ({"mm_spatial_pool_stride": None}, True),
}
"""Fields of config.json, and whether that code computes with the tower in the checkpoint."""


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_is_read_where_the_code_that_trained_it_reads_it(
    family: str, text: str, tmp_path: Path
) -> None:
    fields, is_inside = FAMILIES[family]
    is_inside = is_inside or text == "qwen2"  # only LLaVA-NeXT has Qwen
    original = Original(text=text, extra=fields)
    folder = original.write(tmp_path / "model")
    with torch.no_grad():  # what lies beside is another than what is inside
        for parameter in original.vision.parameters():
            parameter += 0.2
    original.write_tower(tmp_path / "the-tower")
    assert_same_logits(load(folder), Original(text=text) if is_inside else original)


def test_a_given_tower_is_taken(tmp_path: Path) -> None:
    original = Original()
    folder = original.write(tmp_path / "a", tower_inside=False)
    tower = (tmp_path / "the-tower").rename(tmp_path / "elsewhere")
    assert_same_logits(load(folder, vision_tower=tower), original)


@pytest.mark.parametrize("said", [-2, -1])
def test_a_tower_that_was_saved_without_its_last_layer_gives_the_same_features(
    said: int, tmp_path: Path
) -> None:
    # LLaVA-NeXT's SigLIP towers are saved so, and give their last layer whatever is said.
    original = Original(tower="siglip", extra={"mm_vision_select_layer": said})
    folder = original.write(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if "encoder.layers.2." not in n}
    save_file(tensors, file)
    assert_same_logits(load(folder), original)


def test_weights_saved_as_pickled_shards_are_read_too(tmp_path: Path) -> None:
    original = Original()
    folder = original.write(tmp_path / "model")
    from safetensors.torch import load_file

    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    shards = {"pytorch_model-1.bin": tensors[:9], "pytorch_model-2.bin": tensors[9:]}
    for name, shard in shards.items():
        torch.save(dict(shard), folder / name)
    index = {"weight_map": {n: name for name, shard in shards.items() for n, _ in shard}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_logits(load(folder), original)


@pytest.mark.parametrize("case", ["llava-v1.5-pad", "llava-v1-linear-square"])
def test_golden_outputs_of_the_original_code(case: str) -> None:
    folder = GOLDEN / case
    loaded = load(folder / "checkpoint", vision_tower=GOLDEN / "openai-clip-micro")
    outputs = np.load(folder / "golden.npz")
    for record in json.loads((folder / "golden.json").read_text())["records"]:
        images = [Image.open(folder / name).convert("RGB") for name in record["images"]]
        inputs = loaded.encode(record["prompt"], images)
        length = inputs["input_ids"].shape[1]
        expected, greedy = (outputs[f"{name}_{record['index']}"] for name in ("logits", "greedy"))
        with torch.inference_mode():
            logits = loaded.model(**inputs).logits[0, -16:].numpy()
        out = loaded.model.generate(**inputs, max_new_tokens=len(greedy) - 1, do_sample=False)
        assert loaded.tokenize(record["prompt"]) == record["input_ids"]
        assert length == record["sequence_length"]
        assert np.abs(logits - expected).max() < 2e-3
        assert out[0, length:].tolist() == greedy[1:].tolist()
