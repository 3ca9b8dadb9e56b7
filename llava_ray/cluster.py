"""GPUs as Ray sees them: what the cluster has, what its autoscaler can bring, what a process got.

Whoever starts replicas, workers or actors asks `choose_num_gpus`; whoever picks a device asks
`find_assigned_gpus`. Ray is imported when it is asked, never to find out that it is not in use.
"""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

_HEAD = "node:__internal_head__"
"""The resource that only a cluster's head has."""

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def find_assigned_gpus() -> list[str] | None:
    """Return the ids of the GPUs that Ray gave to this process; None: Ray did not start it.

    A driver and a program without Ray may use what they see; a replica, a worker or an actor must
    not: Ray leaves all GPUs visible to a process that asked for none.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return context.get_accelerator_ids()["GPU"]


def choose_num_gpus(num_gpus: float | Literal["auto"], *, if_any: float) -> float:
    """Return how many GPUs to reserve for each process that computes.

    Args:
        num_gpus: the setting.
        if_any: what "auto" stands for in a cluster that has GPUs, or can start machines with some.
    """
    if num_gpus != "auto":
        return num_gpus
    return if_any if if_any and count_gpus() else 0.0


def count_gpus() -> float:
    """Return the GPUs of the cluster, with those of machines that its autoscaler may still start.

    Where Ray is not running, these are this machine's: Ray will be started on it.
    """
    import ray

    if ray.is_initialized():
        return count_resource("GPU")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        return _count_local_gpus()
    try:
        return count_resource("GPU")
    finally:
        ray.shutdown()


def count_resource(name: str) -> float:
    """Return how much of "CPU" or "GPU" the cluster has, or has with all that it may start."""
    import ray

    present = ray.cluster_resources().get(name, 0.0)
    here = ray.get_runtime_context()
    port = here.gcs_address.rpartition(":")[2]
    heads = [node["NodeID"] for node in ray.nodes() if _HEAD in node["Resources"]]
    if here.get_node_id() in heads:
        return max(present, _count_autoscaled(name, port))
    count = ray.remote(num_cpus=0, resources={_HEAD: 0.001})(_count_autoscaled)
    return max(present, ray.get(count.remote(name, port)))


def sum_node_types(config: Mapping[str, Any], name: str) -> float:
    """Return the most of a resource that an autoscaler's configuration allows."""
    most = config.get("max_workers", sys.maxsize)
    numbers = []
    for node_type in config.get("available_node_types", {}).values():
        amount = float(node_type.get("resources", {}).get(name, 0))
        numbers.append(amount * min(node_type.get("max_workers", most), most))
    return sum(numbers)


def _count_autoscaled(name: str, port: str) -> float:
    """Return the most of a resource that the autoscaler may start; to be called on the head.

    Args:
        name: of the resource.
        port: of the cluster's GCS; several clusters may have their heads on one machine.
    """
    config = _read_autoscaler_config(port)
    return sum_node_types(config, name) if config else 0.0


def _read_autoscaler_config(port: str) -> Mapping[str, Any] | None:
    """Return the autoscaler's configuration; None: there is no autoscaler.

    Ray tells it to nobody but its monitor, in that process's arguments. On Kubernetes the monitor
    runs in a container beside the head's, and the configuration is the RayCluster resource.
    """
    import yaml

    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        options = {name: value for name, _, value in (word.partition("=") for word in words)}
        path = options.get("--autoscaling-config")
        if path and options.get("--gcs-address", "").endswith(f":{port}"):
            return yaml.safe_load(Path(path).expanduser().read_text())
    name = os.environ.get("RAY_CLUSTER_NAME")
    if name and _NAMESPACE.exists():
        from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

        return AutoscalingConfigProducer(name, _NAMESPACE.read_text().strip())()
    return None


def _count_local_gpus() -> float:
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    assert manager
    visible = manager.get_current_process_visible_accelerator_ids()
    present = manager.get_current_node_num_accelerators()
    return float(present if visible is None else min(present, len(visible)))
