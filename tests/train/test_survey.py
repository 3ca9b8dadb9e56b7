"""Samples are tried before a run starts, and those that cannot be used are counted; no Ray."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llava_ray.config import DataConfig
from llava_ray.data.loader.order import MixtureComponent, SampleOrder
from llava_ray.errors import ConfigError, ImageError, SampleError
from llava_ray.train import survey
from llava_ray.train.best import choose_best
from llava_ray.train.log import RunLog, StepLine, StepTimes
from llava_ray.train.survey import SampleSurvey, survey_samples
from llava_ray.train.train_step import StepMetrics

CONFIG = DataConfig.model_validate({"datasets": [{"path": "mine"}]})


def survey_lengths(monkeypatch: pytest.MonkeyPatch, outcomes: list[Any]) -> SampleSurvey:
    """Survey samples, each of which has a length or an error."""

    class Reader:
        def __init__(self, _: Any) -> None: ...

        def read(self, number: int) -> int:
            return number

    class Encoder:
        def measure(self, number: int, _: Any) -> int:
            if isinstance(outcomes[number], Exception):
                raise outcomes[number]
            return outcomes[number]

    monkeypatch.setattr(survey, "SampleReader", Reader)
    num = len(outcomes)
    order = SampleOrder((MixtureComponent(num),), np.zeros(num), np.zeros(num, bool), batch_size=4)
    datasets: Any = SimpleNamespace(folders=(), manifests=())
    encoder: Any = Encoder()
    return survey_samples(CONFIG, datasets, order, encoder)


def test_samples_that_cannot_be_used_are_counted_by_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    too_long = SampleError("has 9 tokens", reason="too_long")
    found = survey_lengths(monkeypatch, [7, too_long, too_long, ImageError("no image"), 5])
    assert found.num_unusable == {"too_long": 2, "image": 1}
    assert dict(found.lengths) == {0: 7, 4: 5}
    first, *examples = found.describe()
    assert first.startswith("3 of 5 samples cannot be used")
    assert "2 too_long, 1 image" in first
    assert examples == ["  too_long, first: has 9 tokens", "  image, first: no image"]


def test_no_usable_sample_is_an_error_with_the_first_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    too_long = SampleError("has 9 tokens: raise max_length", reason="too_long")
    with pytest.raises(ConfigError, match=r"12 too_long.*raise max_length"):
        survey_lengths(monkeypatch, [too_long] * 12)


def test_a_step_without_samples_has_no_loss_and_is_told(tmp_path: Any) -> None:
    said: list[str] = []
    log = RunLog(tmp_path, say=said.append)
    log.begin([], num_steps=1, step=0)
    figures = StepMetrics(None, None, 0, 1, 0, 0, (), {"a": "too_long", "b": "image"})
    log.write(StepLine.make(1, figures, StepTimes(0.1, 0.1), rate=1.0, mfu=0.0))
    assert any("loss none" in line for line in said)
    assert any("2 samples left out so far: 1 too_long, 1 image" in line for line in said)
    assert choose_best([("empty", {"loss": float("nan")}), ("real", {"loss": 3.0})], "loss") == (
        "real"
    )
