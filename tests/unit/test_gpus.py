"""How many GPUs Ray is asked for, and what a process does with those it got."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pydantic import ValidationError

from llava_ray import app, cluster
from llava_ray.config import EvaluateConfig, ModelConfig, ServeConfig
from llava_ray.errors import ConfigError
from llava_ray.model import devices
from llava_ray.model.devices import computes_on_gpu, select_device
from tests.support.fake_cuda import pretend_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pretend_cluster(monkeypatch):
    """Return a function that sets the GPUs that the cluster has or can start."""

    def pretend(number: float) -> None:
        monkeypatch.setattr(cluster, "count_gpus", lambda: number)
        monkeypatch.setattr(app, "count_gpus", lambda: number)

    return pretend


def reserve(*models: ModelConfig) -> list[float | str]:
    return [model.num_gpus for model in app._choose_gpus(models)]


def test_auto_reserves_gpus_for_what_computes_on_them_where_there_are_some(pretend_cluster):
    models = [
        ModelConfig(name="a"),
        ModelConfig(name="b", engine="echo"),
        ModelConfig(name="c", device="cpu"),
        ModelConfig(name="d", quantization="int8"),
        ModelConfig(name="e", engine="vllm", engine_options={"tensor_parallel_size": 4}),
        ModelConfig(name="f", num_gpus=0.5),
    ]
    pretend_cluster(8)
    assert reserve(*models) == [1, 0, 0, 0, 4, 0.5]
    pretend_cluster(0)
    assert reserve(*models) == [0, 0, 0, 0, 0, 0.5]


def test_models_that_need_more_gpus_than_there_can_be_are_told(pretend_cluster, monkeypatch):
    told = []
    monkeypatch.setattr(app.log.logger, "warning", told.append)
    pretend_cluster(1)
    reserve(ModelConfig(name="a"))
    assert not told
    reserve(ModelConfig(name="a"), ModelConfig(name="b"))
    assert "need 2 GPUs, and the cluster has or can start 1" in told[0]


def test_every_short_form_sets_the_gpus_of_a_replica(monkeypatch):
    assert ServeConfig().models[0].num_gpus == "auto"
    assert ServeConfig(num_gpus=0.5).models[0].num_gpus == 0.5
    assert ServeConfig.model_validate({"num_gpus": "1"}).models[0].num_gpus == 1
    monkeypatch.setenv("LLAVA_RAY_NUM_GPUS", "1")
    assert ServeConfig().models[0].num_gpus == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"device": "cpu", "num_gpus": 1}, "computes on CPUs.*num_gpus=0"),
        ({"num_gpus": 2}, "torch engine computes on one GPU"),
        ({"engine": "vllm", "num_gpus": 1.5}, "whole number"),
        ({"engine": "vllm", "num_gpus": 2}, "computes on 1"),
        (
            {"engine": "vllm", "num_gpus": 1, "engine_options": {"tensor_parallel_size": 2}},
            "num_gpus=1, but vllm computes on 2",
        ),
        ({"engine": "sglang", "num_gpus": 2, "engine_options": {"tp_size": 4}}, "computes on 4"),
    ],
)
def test_gpus_that_a_replica_would_not_use_or_would_miss_are_refused(settings, told):
    with pytest.raises(ValidationError, match=told):
        ModelConfig(**settings)


def test_an_evaluation_that_asks_a_server_needs_no_gpu():
    here = EvaluateConfig(tasks=["pope"], data="d", output="o")
    there = EvaluateConfig(tasks=["pope"], data="d", output="o", endpoint="http://localhost:8000")
    assert (here.gpus_if_any, there.gpus_if_any) == (1, 0)
    with pytest.raises(ValidationError, match="one GPU"):
        EvaluateConfig(tasks=["pope"], data="d", output="o", num_gpus=2)


def test_an_autoscaler_that_starts_from_no_machine_brings_gpus():
    for file, most in (("cluster.yaml", 20), ("jobs/configs/cluster_gcp.yaml", 12)):
        config = yaml.safe_load((ROOT / file).read_text())
        assert cluster.sum_node_types(config, "GPU") == most
    assert cluster.sum_node_types({"available_node_types": {}}, "GPU") == 0


def pretend_ray_process(monkeypatch, assigned: list[str] | None) -> None:
    monkeypatch.setattr(devices, "find_assigned_gpus", lambda: assigned)


def test_a_process_without_a_gpu_of_its_own_computes_on_the_cpu_whatever_torch_sees(monkeypatch):
    pretend_gpu(monkeypatch, count=8)
    pretend_ray_process(monkeypatch, [])
    assert select_device("auto") == torch.device("cpu")
    pretend_ray_process(monkeypatch, ["3"])
    assert select_device("auto") == torch.device("cuda")
    pretend_ray_process(monkeypatch, None)
    assert select_device("auto") == torch.device("cuda")


def test_a_process_whose_gpu_torch_cannot_use_never_computes_on_the_cpu(monkeypatch):
    pretend_ray_process(monkeypatch, ["0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert computes_on_gpu()
    with pytest.raises(ConfigError, match=r"torch sees 0 GPUs here \(.*num_gpus=0"):
        select_device("auto")


def test_only_a_process_that_ray_started_is_bound_to_what_ray_gave(monkeypatch):
    def pretend_ray(mode: int) -> SimpleNamespace:
        context = SimpleNamespace(
            worker=SimpleNamespace(mode=mode), get_accelerator_ids=lambda: {"GPU": ["1"]}
        )
        return SimpleNamespace(
            is_initialized=lambda: True, get_runtime_context=lambda: context, WORKER_MODE=1
        )

    monkeypatch.setitem(cluster.sys.modules, "ray", pretend_ray(mode=1))
    assert cluster.find_assigned_gpus() == ["1"]
    monkeypatch.setitem(cluster.sys.modules, "ray", pretend_ray(mode=0))
    assert cluster.find_assigned_gpus() is None
