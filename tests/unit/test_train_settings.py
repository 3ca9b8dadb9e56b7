"""A training run's YAML: what is refused, what follows from it, and DeepSpeed's configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from llava_ray import recipes
from llava_ray.config import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.model import load_model
from llava_ray.train.deepspeed_config import describe_engine
from llava_ray.train.param_groups import find_param_group, make_optimizer_groups, select_trainable
from llava_ray.train.schedule import compute_lr_scale, count_warmup
from llava_ray.train.settings import load_train_config
from tests.support.tiny_checkpoint import tiny_model

RECIPES = [p for p in sorted(recipes.FOLDER.glob("*.yaml")) if "method:" in p.read_text()]


def write(folder: Path, **settings: Any) -> Path:
    content: dict[str, Any] = {
        "name": "run",
        "model": "demo",
        "data": {"datasets": [{"path": "shards"}]},
        "train_batch_size": 8,
        "per_device_train_batch_size": 2,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(content | settings))
    return path


def engine(config: TrainConfig, num_workers: int = 1) -> dict[str, Any]:
    return describe_engine(config, num_workers=num_workers, hidden_size=64, is_bf16=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_run(path: Path) -> None:
    config = load_train_config(path)
    engine(config, config.num_workers)


@pytest.mark.parametrize(
    "path", sorted(recipes.FOLDER.glob("zero*.json")), ids=lambda path: path.stem
)
def test_a_shipped_deepspeed_json_has_every_auto_filled_in(path: Path, tmp_path: Path) -> None:
    config = load_train_config(write(tmp_path, deepspeed=str(path)))
    resolved = engine(config)
    assert "auto" not in json.dumps(resolved)
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["zero_optimization"]["stage"] == int(path.stem[4])


@pytest.mark.parametrize(("hidden_size", "numel"), [(64, 2**22), (4096, 4096**2)])
def test_gradients_are_reduced_many_at_once_in_small_models_too(
    tmp_path: Path, hidden_size: int, numel: int
) -> None:
    config = load_train_config(write(tmp_path))
    made = describe_engine(config, num_workers=1, hidden_size=hidden_size, is_bf16=False)
    assert made["zero_optimization"]["reduce_bucket_size"] == numel


def test_the_global_batch_stays_the_same_on_any_number_of_workers(tmp_path: Path) -> None:
    config = load_train_config(write(tmp_path))
    assert [config.count_accumulation(n) for n in (1, 2, 3, 4, 5)] == [4, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr_scheduler_type": "cosine"}, "cosine"),
        ({"lr_scheduler_type": "linear"}, "linear"),
        ({"lr_scheduler_type": "constant"}, "constant_with_warmup"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 7}, "linear"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0}, "constant"),
    ],
)
def test_the_learning_rate_goes_as_in_transformers(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    config = load_train_config(write(tmp_path, warmup_ratio=0.1, **settings), [])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(name, optimizer, count_warmup(config, 30), 30)
    for step in range(30):
        assert compute_lr_scale(config, step, 30) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert count_warmup(config, 30) == settings.get("warmup_steps", 3)


def test_each_part_has_its_own_learning_rate_and_decay(tmp_path: Path) -> None:
    rates = {"learning_rate": 1e-3, "mm_projector_lr": 2e-3, "vision_lr": 3e-3}
    decays = {"weight_decay": 0.1, "mm_projector_weight_decay": 0.2, "vision_weight_decay": 0.3}
    path = write(tmp_path, train_vision_tower=True, **rates, **decays)
    config = load_train_config(path, [])
    model: Any = load_model(tiny_model(), dtype="float32", device="cpu").model
    select_trainable(model, config)
    groups = make_optimizer_groups(model, config)
    assert {(g["part"], g["lr"], g["weight_decay"]) for g in groups if g["weight_decay"]} == {
        ("language_model", 1e-3, 0.1),
        ("projector", 2e-3, 0.2),
        ("vision_tower", 3e-3, 0.3),
    }
    parts = {id(p): g["part"] for g in groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(parts) == len(trained)
    for name, parameter in trained.items():
        assert parts[id(parameter)] == find_param_group(name), name
    assert all(p.ndim == 1 for g in groups if not g["weight_decay"] for p in g["params"])


def test_settings_inside_others_are_set_from_the_command_line(tmp_path: Path) -> None:
    overrides = ["learning_rate=1e-3", "data.max_length=99", "data.datasets.0.path=other"]
    config = load_train_config(write(tmp_path), overrides)
    assert (config.learning_rate, config.data.max_length) == (1e-3, 99)
    assert config.data.datasets[0].path == "other"
    assert config.data.batch_size == config.train_batch_size


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["learning_rat=1e-3"], "did you mean learning_rate"),
        (["data.max_lengt=1"], "did you mean max_length"),
        (["train_batch_size=9"], "not a multiple of per_device_train_batch_size=2"),
        (["gradient_accumulation_steps=3"], "remove gradient_accumulation_steps"),
        (["data.batch_size=4"], "remove data.batch_size"),
        (["quantization=4bit"], "set method=lora"),
        (["quantization=4bit", "method=lora", "zero_stage=3"], "zero_stage=2 or lower"),
        (["eval_steps=5"], "needs eval_datasets"),
        (["offload=all"], "zero_stage=3"),
        (["min_workers=2"], "more than num_workers=1"),
        (["learning_rate=fast"], "learning_rate"),
        (["learning_rate"], "write key=value"),
        (["data.datasets.7.path=x"], "has no place"),
        (["metric_for_best_model=eval_loss"], "needs eval_datasets"),
        (["metric_for_best_model=pope"], "a task of benchmarks"),
        (["benchmarks.tasks=[pope]"], "benchmarks.data"),
        (["benchmarks={tasks: [pope], data: x, steps: 7}", "save_steps=2"], "not a multiple of"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_remedy(
    tmp_path: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_train_config(write(tmp_path), overrides)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"train_batch_size": 4}, "train_batch_size=4"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}, "allgather"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "learning_rate"),
    ],
)
def test_a_deepspeed_json_that_contradicts_the_run_is_refused(
    tmp_path: Path, content: dict[str, Any], says: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=says):
        engine(load_train_config(write(tmp_path, deepspeed=str(path))))


def test_an_optimizer_that_is_all_auto_is_the_runs_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "bf16": {"enabled": "auto"},
    }
    path.write_text(json.dumps(content))
    assert "optimizer" not in engine(load_train_config(write(tmp_path, deepspeed=str(path))))
