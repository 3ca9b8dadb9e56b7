"""Configuration: where values come from, and what is said about wrong ones."""

import pytest
from pydantic import ValidationError

from llava_ray.config import ConvertConfig, LimitsConfig, ModelConfig, ServeConfig

CONVERSION = {"source": "llava", "input": "a", "output": "b"}


def test_without_anything_the_embedded_model_is_served() -> None:
    (model,) = ServeConfig().models
    assert (model.path, model.name, model.engine) == ("demo", "llava-ray-demo", "torch")


def test_the_environment_names_the_model_and_arguments_win_over_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAVA_RAY_MODEL", "llava-hf/llava-1.5-7b-hf")
    assert ServeConfig.model_validate({}).models[0].name == "llava-1.5-7b-hf"
    assert ServeConfig.model_validate({"model": "./mine/"}).models[0].name == "mine"


def test_a_misspelt_setting_is_refused_with_the_name_it_may_have_meant() -> None:
    with pytest.raises(ValidationError, match=r"unknown setting modle: did you mean model\?"):
        ServeConfig.model_validate({"modle": "x"})
    with pytest.raises(ValidationError, match=r"did you mean max_replicas\?"):
        ServeConfig.model_validate({"models": [{"max_replica": 2}]})


def test_a_misspelt_variable_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_RAY_MODLE", "x")
    with pytest.raises(ValidationError, match=r"LLAVA_RAY_MODLE: did you mean LLAVA_RAY_MODEL\?"):
        ServeConfig()


def test_one_model_is_described_in_short() -> None:
    settings = {"model": "/a/llava", "dtype": "bfloat16", "quantization": "int8"}
    (model,) = ServeConfig.model_validate(settings).models
    assert (model.path, model.dtype, model.quantization) == ("/a/llava", "bfloat16", "int8")
    with pytest.raises(ValidationError, match="quantization"):
        ServeConfig.model_validate({"quantization": "int9"})


@pytest.mark.parametrize("engine", ["VLLM", "SGLANG"])
def test_the_python_of_another_engine_is_named_beside_the_settings(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"LLAVA_RAY_{engine}_PYTHON", "/there/bin/python")
    assert ServeConfig().models[0].path == "demo"


def test_values_out_of_bounds_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_replicas"):
        ModelConfig(min_replicas=3, max_replicas=2)
    with pytest.raises(ValidationError, match="engine"):
        ServeConfig.model_validate({"engine": "tensorrt"})


def test_models_side_by_side_have_names_of_their_own() -> None:
    with pytest.raises(ValidationError, match="two models are named"):
        ServeConfig(models=[ModelConfig(path="a/x"), ModelConfig(path="b/x")])


def test_every_field_says_what_it_is() -> None:
    for section in (ServeConfig, ModelConfig, LimitsConfig):
        assert all(field.description for field in section.model_fields.values())


@pytest.mark.parametrize(
    ("section", "required", "old", "new", "value"),
    [
        (ModelConfig, {}, "picture_cache_mb", "image_cache_mb", 7),
        (
            ConvertConfig,
            {"source": "llava", "input": "a", "output": "b"},
            "pictures",
            "images",
            "c",
        ),
    ],
)
def test_an_older_name_of_a_setting_works_and_says_what_it_is_called_now(
    section, required, old, new, value
) -> None:
    with pytest.warns(FutureWarning, match=f"{old} is now called {new}"):
        described = section(**required, **{old: value})
    assert getattr(described, new) == value
    with pytest.raises(ValueError, match=f"give only {new}"):
        section(**required, **{old: value, new: value})
