"""A field of a checkpoint's files may hold anything: loading it is a ConfigError or goes well."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_ray.errors import ConfigError
from llava_ray.model.doctor import diagnose
from llava_ray.model.loading import load_model
from tests.support.hf_checkpoints import write_published
from tests.support.llava_checkpoints import Original
from tests.support.partial_checkpoints import make_lora, write_adapter

ODD: list[Any] = [None, 5, -1, True, "", "x", [], [None], {}, {"a": 1}, 1e308]
MORE_FIELDS = (
    *("architectures", "quantization_config", "mm_tunable_parts", "llava_ray_template"),
    *("image_grid_pinpoints", "chat_template", "trainable_token_indices", "alpha_pattern"),
)
NUM_CHANGES = 120


def write_adapted(folder: Path) -> Path:
    whole = Original().write(folder.parent / "whole")
    return write_adapter(folder, make_lora(Original()), str(whole))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "llava": lambda folder: Original().write(folder),
    "llava_next": lambda folder: write_published(folder, "llava_next"),
    "llava_onevision": lambda folder: write_published(folder, "llava_onevision"),
    "adapter": write_adapted,
}
FILES = ("config.json", "adapter_config.json", "processor_config.json")
FILES += ("preprocessor_config.json", "tokenizer_config.json")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITERS)
def test_no_value_of_a_field_ends_in_a_traceback(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    folder = tmp_path / "model"
    WRITERS[kind](folder)
    files = [folder / name for name in FILES if (folder / name).is_file()]
    for _ in range(NUM_CHANGES):
        file = rng.choice(files)
        whole = file.read_text()
        content = json.loads(whole)
        field = rng.choice([*content, *MORE_FIELDS])
        file.write_text(json.dumps({**content, field: rng.choice(ODD)}))
        diagnose(folder)  # tells whatever is wrong, and raises nothing
        file.write_text(whole)
    assert not diagnose(folder).problems


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("architectures", 5, "architectures is '5', and not a list"),
        ("image_token_index", "x", "image_token_index is 'x', and not a whole number"),
        ("vision_config", 5, "vision_config is '5', and not an object"),
    ],
)
def test_a_field_of_another_type_is_named(
    field: str, value: Any, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_published(folder, "llava_onevision")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ConfigError, match=said):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("index", ["[]", "5", '{"weight_map": []}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none_is_told(index: str, tmp_path: Path) -> None:
    folder = Original().write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=r"index\.json|lacks 1 of 1 weight files"):
        load_model(folder, device="cpu")
    assert diagnose(folder).problems
