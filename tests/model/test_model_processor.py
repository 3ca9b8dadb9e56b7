"""What a checkpoint says of images and templates is checked before it answers the first request."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_ray.data.loader.encode import load_encoder
from llava_ray.errors import ConfigError, RequestError
from llava_ray.model.doctor import diagnose
from llava_ray.model.export.export import export_model
from llava_ray.model.loading import load_without_weights
from llava_ray.types import ImagePart, Message, TextPart
from tests.support.hf_checkpoints import write_published
from tests.support.llava_checkpoints import Original
from tests.support.reference_logits import assert_same_logits, load

IMAGE = ImagePart(b"")
TEXT_ONLY = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
JOINED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
FIRST_IMAGE_ONLY = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' and loop.first %}"
    "<image>{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
WITH_IMAGES = (
    "{% for m in messages %}<<{{ m['role'] }}>>{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
)


def change(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | fields))


def remove(file: Path, *names: str) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({n: v for n, v in content.items() if n not in names}))


def write(folder: Path, kind: str, template: str = WITH_IMAGES) -> Path:
    write_published(folder, kind)
    for file in ("chat_template.jinja", "chat_template.json"):
        (folder / file).unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def refuse(folder: Path, **options: Any) -> str:
    """Return the message with which loading, training's encoder and doctor refuse a checkpoint."""
    with pytest.raises(ConfigError) as caught:
        load(folder, **options)
    with pytest.raises(ConfigError) as trained:
        load_encoder(str(folder), **options)
    assert trained.value.message == caught.value.message
    assert caught.value.message in diagnose(folder, **options).problems
    return caught.value.message


# ---- templates ----


def test_chat_template_json_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llava")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": WITH_IMAGES}))
    rendered = load(folder).template.render([Message("user", (IMAGE, TextPart("a")))])
    assert rendered == "<<user>><image>a"


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("source", [TEXT_ONLY, JOINED, FIRST_IMAGE_ONLY])
def test_a_template_that_loses_images_is_refused_as_the_checkpoints_fault(
    source: str, kind: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", kind, source)
    message = refuse(folder)
    assert "cannot render an image" in message
    assert "give the template" in message
    with pytest.raises(ConfigError, match="cannot render an image"):
        load_without_weights(folder)
    assert load(folder, template="vicuna_v1").template.name == "vicuna_v1"
    assert not diagnose(folder, template="vicuna_v1").problems


def test_a_language_models_own_template_is_not_that_of_a_llava(tmp_path: Path) -> None:
    folder = Original().write(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(JOINED.replace("'role'", "'role'  # image"))
    assert load(folder).template.name == "vicuna_v1"
    with pytest.raises(ConfigError, match="cannot render an image"):
        load(folder, template="own")


def test_images_that_a_template_drops_later_are_told_to_the_caller(tmp_path: Path) -> None:
    source = WITH_IMAGES.replace(
        "'<image>' if p['type'] == 'image'",
        "('<image>' if m['role'] == 'user' else '') if p['type'] == 'image'",
    )
    template = load(write(tmp_path / "model", "llava", source)).template
    with pytest.raises(RequestError, match="writes 0 of 1 images"):
        template.render([Message("system", (IMAGE, TextPart("a"))), Message("user", ())])


@pytest.mark.parametrize("eos", ["<|eot_id|>", "<end_of_turn>", "<|endoftext|>"])
def test_a_template_that_is_not_known_is_not_guessed(eos: str, tmp_path: Path) -> None:
    folder = Original().write(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = json.loads((folder / "tokenizer.json").read_text())
    text = json.dumps(tokens).replace(json.dumps(config["eos_token"]), json.dumps(eos))
    (folder / "tokenizer.json").write_text(text)
    change(folder / "tokenizer_config.json", eos_token=eos)
    message = refuse(folder)
    assert "does not say which conversation template" in message
    assert repr(eos) in message
    assert "give it as template, one of" in message
    assert load(folder, template="llava_v1").template.name == "llava_v1"
    with pytest.raises(ConfigError, match="which conversation template"):
        export_model(folder, tmp_path / "out")
    export_model(folder, tmp_path / "out", template="llava_v1")
    assert load(tmp_path / "out").template.name == "llava_v1"


# ---- numbers of image tokens ----


def change_tower(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", vision_config=config["vision_config"] | fields)


MISFITS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no class token": (
        "llava",
        lambda folder: change(folder / "processor_config.json", num_additional_image_tokens=0),
        "num_additional_image_tokens",
    ),
    "another patch size": (
        "llava_next",
        lambda folder: change(folder / "processor_config.json", patch_size=14),
        "patch_size",
    ),
    "OneVision's number": (
        "llava_onevision",
        lambda folder: change(folder / "processor_config.json", num_image_tokens=17),
        "num_image_tokens",
    ),
    "no image token": (
        "llava",
        lambda folder: remove(folder / "config.json", "image_token_index", "image_token_id"),
        '"image_token_index": ',
    ),
    "text for a number": (
        "llava",
        lambda folder: change(folder / "processor_config.json", num_additional_image_tokens="1"),
        "num_additional_image_tokens='1' is not a number of at least 0: remove it",
    ),
    "a number below one": (
        "llava_next",
        lambda folder: change(folder / "processor_config.json", patch_size=-7),
        "patch_size=-7 is not a number of at least 1: remove it",
    ),
    "a number for an image token": (
        "llava",
        lambda folder: change(folder / "processor_config.json", image_token=5),
        "image_token=5 is not text",
    ),
    "a class token in each tile": (
        "llava_next",
        lambda folder: change(folder / "config.json", vision_feature_select_strategy="full"),
        "vision_feature_select_strategy='full'",
    ),
    "a strategy that is not known": (
        "llava",
        lambda folder: change(folder / "config.json", vision_feature_select_strategy="patch"),
        "vision_feature_select_strategy",
    ),
    "a layer that the tower lacks": (
        "llava_onevision",
        lambda folder: change(folder / "config.json", vision_feature_layer=99),
        "layer 99",
    ),
    "other tiles": (
        "llava_next",
        lambda folder: change(folder / "config.json", image_grid_pinpoints=[[28, 28]]),
        "image_grid_pinpoints=[[28, 28]]",
    ),
    "tiles of nothing": (
        "llava_onevision",
        lambda folder: change(folder / "config.json", image_grid_pinpoints=None),
        "image_grid_pinpoints=",
    ),
    "another rule for many tiles": (
        "llava_onevision",
        lambda folder: change(folder / "config.json", vision_aspect_ratio="anyres_max_"),
        "vision_aspect_ratio='anyres_max_'",
    ),
    "no tower": (
        "llava",
        lambda folder: change(folder / "config.json", vision_config=None),
        "336 x 336",  # transformers' own tower
    ),
    "a tower that nobody knows": (
        "llava",
        lambda folder: change_tower(folder, model_type="intern_vit"),
        "the vision tower has model_type 'intern_vit'; only CLIP and SigLIP",
    ),
    "a tower that is a whole model": (
        "llava_next",
        lambda folder: change_tower(folder, model_type="qwen2_vl"),
        "the vision tower has model_type 'qwen2_vl'",
    ),
    "a tower of another family": (
        "llava",
        lambda folder: change_tower(folder, model_type="dinov2"),
        "the vision tower has model_type 'dinov2'",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_processor_that_does_not_fit_the_tower_is_refused(name: str, tmp_path: Path) -> None:
    kind, spoil, field = MISFITS[name]
    folder = write(tmp_path / "model", kind)
    assert not diagnose(folder).problems
    spoil(folder)
    assert field in refuse(folder)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_fields_that_are_null_or_missing_have_the_towers_values(kind: str, tmp_path: Path) -> None:
    names = ("patch_size", "num_additional_image_tokens", "num_image_tokens")
    names += ("vision_feature_select_strategy", "image_token")
    expected = load(write(tmp_path / "whole", kind)).processor
    for spoil in (
        lambda file: change(file, **dict.fromkeys(names)),
        lambda file: remove(file, *names),
    ):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / "model", dirs_exist_ok=True)
        spoil(folder / "processor_config.json")
        found = load(folder).processor
        for name in names:
            assert getattr(found, name, None) == getattr(expected, name, None), name


TOWER_MISFITS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "tiles of another size": (
        lambda folder, _: change(
            folder / "config.json", image_aspect_ratio="anyres", image_grid_pinpoints=[[30, 50]]
        ),
        "use multiples of 28",
    ),
    "a layer that the tower lacks": (
        lambda folder, _: change(folder / "config.json", mm_vision_select_layer=99),
        "layer 99",
    ),
    "a size that is none": (
        lambda _, tower: change(tower / "preprocessor_config.json", size=28.5),
        "does not describe image preprocessing",
    ),
    "no size": (
        lambda _, tower: change(tower / "preprocessor_config.json", size=None, crop_size=None),
        "the image preprocessing cannot be used",
    ),
    "no patch size": (lambda _, tower: remove(tower / "config.json", "patch_size"), "patch_size"),
    "a tower of another family": (
        lambda _, tower: change(tower / "config.json", model_type="dinov2"),
        "the vision tower has model_type 'dinov2'",
    ),
}


@pytest.mark.parametrize("name", TOWER_MISFITS)
def test_a_tower_that_does_not_fit_llavas_format_is_refused(name: str, tmp_path: Path) -> None:
    folder = Original().write(tmp_path / "model")
    spoil, message = TOWER_MISFITS[name]
    spoil(folder, tmp_path / "the-tower")
    assert message in refuse(folder)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_towers_configuration_tells_its_kind(kind: str, tmp_path: Path) -> None:
    original = Original(tower=kind)
    folder = original.write(tmp_path / "model")
    other = "CLIPImageProcessor" if kind == "siglip" else "SiglipImageProcessor"
    for said in (other, None):
        change(tmp_path / "the-tower" / "preprocessor_config.json", image_processor_type=said)
        assert_same_logits(load(folder), original)


def test_images_of_another_size_than_the_tower_reads_are_refused(tmp_path: Path) -> None:
    folder = Original().write(tmp_path / "model")
    change(tmp_path / "the-tower" / "preprocessor_config.json", size=56, crop_size=56)
    assert "56 x 56 pixels, and the vision tower reads 28 x 28" in refuse(folder)


def test_a_tower_of_another_kind_is_named_with_what_serves_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llava")
    change_tower(folder, model_type="pixtral", image_size=28, patch_size=7, hidden_size=16)
    for open_it in (load, load_without_weights):  # the second is how engine: vllm opens it
        with pytest.raises(ConfigError, match=r"'pixtral'.*with vLLM itself"):
            open_it(folder)
    assert any("'pixtral'" in problem for problem in diagnose(folder).problems)
