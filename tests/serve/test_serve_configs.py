"""The files that are deployed: Serve and the applications accept them, in any folder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.build_app import build_app as build_deployments
from ray.serve.deployment import deployment_to_schema
from ray.serve.schema import ServeDeploySchema

from llava_ray import app
from llava_ray.config import LimitsConfig, PageConfig, ServeConfig
from llava_ray.serve.page import build_app as build_page

pytestmark = pytest.mark.ray

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SERVE = [CONFIGS / "serve.yaml", CONFIGS / "serve_multi.yaml"]
KUBERAY = sorted((CONFIGS / "kuberay").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def build(config: ServeConfig) -> dict[str, dict[str, Any]]:
    """Return what `serve build` writes about an application: the settings of its deployments."""
    built = build_deployments(app.build_app(config), name="api")
    schemas = [deployment_to_schema(each) for each in built.deployments]
    return {each.name: each.model_dump(exclude_unset=True) for each in schemas}


def test_serve_build_writes_the_application(tmp_path: Path) -> None:
    # It takes no arguments for a builder, so it can write the default application alone.
    serve, file = Path(sys.executable).parent / "serve", tmp_path / "built.yaml"
    subprocess.run(
        [serve, "build", "llava_ray.app:deployment", "-o", file],
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent.parent), "PYTHONWARNINGS": "ignore"},
        timeout=120,
        check=True,
    )
    (application,) = read(file)["applications"]
    deployments = {each["name"]: each for each in application["deployments"]}
    own = build(ServeConfig())
    assert list(deployments) == list(own)
    for name, settings in own.items():
        assert deployments[name].keys() == settings.keys()
        for each in ("max_ongoing_requests", "autoscaling_config", "ray_actor_options"):
            assert deployments[name].get(each) == settings.get(each)


@pytest.mark.parametrize("path", SERVE, ids=lambda path: path.stem)
def test_a_serve_file_has_the_deployments_of_serve_build_and_says_what_differs(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(read(path))
    api = schema.applications[0]
    assert api.import_path == "llava_ray.app:build_app"
    built = build(ServeConfig.model_validate(api.args))
    described = {each.name: each.model_dump(exclude_unset=True) for each in api.deployments}
    assert described.keys() == built.keys()
    may_differ = {"logging_config", "max_surge_percent"}
    for name, settings in described.items():
        scaling = settings.pop("autoscaling_config", {})
        assert built[name].get("autoscaling_config", {}).items() <= scaling.items() or not scaling
        assert settings.keys() <= {"name", *may_differ}
        for field in settings.keys() & may_differ:
            assert settings[field] != built[name].get(field), f"{name}.{field} is as built"


def test_what_is_replaced_may_finish_whatever_a_request_may_take() -> None:
    for settings in build(ServeConfig(limits=LimitsConfig(request_timeout_s=7))).values():
        assert 7 < settings["graceful_shutdown_timeout_s"] < 30
    page = build_page(PageConfig())
    (schema,) = map(deployment_to_schema, build_deployments(page, name="page").deployments)
    assert schema.graceful_shutdown_timeout_s > ServeConfig().limits.request_timeout_s


@pytest.mark.parametrize("path", SERVE, ids=lambda path: path.stem)
def test_two_gateways_answer_and_an_update_starts_the_new_before_the_old_ends(path: Path) -> None:
    api = ServeDeploySchema.model_validate(read(path)).applications[0]
    assert ServeConfig.model_validate(api.args).num_gateways == 2
    assert all(each.max_surge_percent > 0 for each in api.deployments)


def test_the_application_and_the_file_agree_on_when_a_model_sleeps() -> None:
    api = ServeDeploySchema.model_validate(read(CONFIGS / "serve.yaml")).applications[0]
    (model,) = ServeConfig.model_validate(api.args).models
    deployment = next(each for each in api.deployments if each.name == model.name)
    scaling = deployment.autoscaling_config
    assert scaling["min_replicas"] == model.min_replicas == 0
    assert scaling["max_replicas"] == model.max_replicas
    assert scaling["target_ongoing_requests"] == model.target_ongoing_requests


def test_kubernetes_serves_what_serve_deploy_serves() -> None:
    service = read(CONFIGS / "kuberay" / "rayservice.yaml")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == read(CONFIGS / "serve.yaml")


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_a_kubernetes_cluster_is_of_the_ray_that_is_installed_and_asks_for_a_token(
    path: Path,
) -> None:
    import ray

    clusters = list(find_clusters(read(path)["spec"]))
    assert len(clusters) == 1
    (cluster,) = clusters
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] == 0 for group in cluster["workerGroupSpecs"])


def find_clusters(value: Any) -> Any:
    if isinstance(value, dict):
        if "headGroupSpec" in value:
            yield value
        for each in value.values():
            yield from find_clusters(each)
