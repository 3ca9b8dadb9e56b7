"""What clients see while machines die, models change and load is too high, on a real cluster.

The cluster has three nodes, each a process group of this machine. Every request is accounted for.
The tests need the machine for themselves: `TEST_CLUSTER=1 pytest -m cluster`.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.support.load_clients import Ask, LoadRecord, ask, run_clients
from tests.support.ray_nodes import ROOT, RayNodes, start_nodes, wait_for
from tests.support.wait import wait_until_ended

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="wants the whole machine"),
]

WORD_S = 0.05
LONG_WORDS = 1200  # a minute: longer than Serve by itself lets go on what it replaces
CHECKS = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", (ROOT / "cluster.yaml").read_text()))
"""How soon Ray misses a node. By its defaults it starts replicas on a dead one for 15 seconds."""
ECHO = {"engine": "echo", "echo_delay_s": WORD_S, "num_cpus": 0.2}


def describe_steady(**model: Any) -> dict[str, Any]:
    """One gateway and a model of two replicas, on different nodes."""
    models = [{"path": "echo", "min_replicas": 2, "max_replicas": 2, **ECHO, **model}]
    return {
        "name": "steady",
        "route_prefix": "/",
        "import_path": "llava_ray.app:build_app",
        "args": {"page": False, "models": models},
        "deployments": [
            {"name": "gateway", "max_surge_percent": 100},
            {"name": "echo", "max_surge_percent": 50},
        ],
    }


def describe_elastic() -> dict[str, Any]:
    """Two gateways, a model that scales to zero, and one with little capacity."""
    sleeper = {"path": "sleeper", "min_replicas": 0, "max_replicas": 2, **ECHO}
    small = {"path": "small", "max_ongoing_requests": 2, "max_queued_requests": 2, **ECHO}
    scaling = {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_ongoing_requests": 4,
        "upscale_delay_s": 1,
        "downscale_delay_s": 2,
        "downscale_to_zero_delay_s": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
    }
    log = {"encoding": "JSON"}
    return {
        "name": "elastic",
        "route_prefix": "/elastic",
        "import_path": "llava_ray.app:build_app",
        "args": {"page": False, "num_gateways": 2, "models": [sleeper, small]},
        "deployments": [
            {"name": "gateway", "logging_config": log},
            {"name": "sleeper", "autoscaling_config": scaling},
            {"name": "small", "logging_config": log},
        ],
    }


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with start_nodes(num_workers=2, **CHECKS) as nodes:
        nodes.deploy(describe_steady(), describe_elastic())
        for name in ("steady", "elastic"):
            wait_for(lambda name=name: is_running(nodes, name), 180)
        yield nodes


def is_running(nodes: RayNodes, application: str) -> bool:
    return nodes.read_application(application).get("status") == "RUNNING"


def find_pids(nodes: RayNodes, application: str, deployment: str) -> set[int]:
    return {each["pid"] for each in nodes.list_replicas(application, deployment)}


async def until(is_true: Any, timeout_s: float = 120) -> None:
    await asyncio.to_thread(wait_for, is_true, timeout_s)


def accounts_for_all(record: LoadRecord) -> bool:
    return record.num_started == len(record.asks) and all(
        ask.end != "done" or ask.num_words == 60 for ask in record.asks
    )


def test_nothing_answers_without_the_token_but_the_public_port(nodes: RayNodes) -> None:
    public = httpx.get(f"{nodes.url}/healthz", trust_env=False)
    assert public.status_code == 200
    for path in ("/api/jobs/", "/api/serve/applications/", "/api/v0/nodes", "/api/cluster_status"):
        for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
            answer = httpx.get(nodes.dashboard + path, headers=headers, trust_env=False)
            assert answer.status_code in (401, 403), f"{path} without the token: {answer}"
    asked = nodes.run_ray("status", RAY_AUTH_TOKEN="0" * 64)
    assert asked.returncode != 0
    assert "InvalidAuthToken" in asked.stdout or "Unauthenticated" in asked.stdout


def test_a_node_that_dies_takes_no_more_than_its_own_streams(nodes: RayNodes) -> None:
    async def scene() -> None:
        async with run_clients(nodes.url, num_clients=16) as record:
            await until(lambda: len(record.asks) >= 16)
            before = find_pids(nodes, "steady", "echo")
            victim = find_victim(nodes)
            lost = victim.pids & before
            killed_at = time.monotonic()
            await asyncio.to_thread(victim.kill)
            await until(lambda: len(find_pids(nodes, "steady", "echo") - lost) == 2)
            back_at = time.monotonic()
            await until(lambda: len(record.since(back_at).asks) >= 16)

        broken_s = [one.ended_at - killed_at for one in record.asks if one.end == "error"]
        print(f"{len(broken_s)} streams ended with an error after {max(broken_s, default=0):.2f} s")
        print(f"both replicas ran again after {back_at - killed_at:.1f} s")
        assert accounts_for_all(record)
        assert set(record.count()) == {"done", "error"}
        assert record.count()["error"] < 16, "streams on the other node broke off too"
        for one in record.asks:
            if one.end == "error":
                assert one.started_at < killed_at < one.ended_at < killed_at + 5
                assert "died and is being replaced: try again" in one.why
        assert set(record.since(back_at).count()) == {"done"}

    asyncio.run(scene())


def find_victim(nodes: RayNodes) -> Any:
    """Return a worker node that runs a replica of the model and no gateway."""
    models = find_pids(nodes, "steady", "echo")
    gateways = find_pids(nodes, "steady", "gateway")
    return next(node for node in nodes.nodes[1:] if node.pids & models and not node.pids & gateways)


def test_an_update_under_load_fails_nobody_and_cuts_off_no_long_answer(nodes: RayNodes) -> None:
    async def scene() -> None:
        patient = LoadRecord()
        async with (
            httpx.AsyncClient(base_url=nodes.url, timeout=120, trust_env=False) as client,
            run_clients(nodes.url, num_clients=8) as record,
        ):
            await until(lambda: len(record.asks) >= 8)
            old = find_pids(nodes, "steady", "echo") | find_pids(nodes, "steady", "gateway")
            old_processes = [psutil.Process(pid) for pid in old]
            long = asyncio.create_task(ask(client, patient, model="echo", max_tokens=LONG_WORDS))
            await until(lambda: patient.num_started == 1)
            nodes.deploy(describe_steady(messages_per_s=99), describe_elastic())

            def is_new() -> bool:
                now = find_pids(nodes, "steady", "echo") | find_pids(nodes, "steady", "gateway")
                return len(now) == 3 and not now & old

            await until(is_new)
            replaced_at = time.monotonic()
            one = await long
        assert (one.end, one.num_words) == ("done", LONG_WORDS)
        assert one.ended_at - replaced_at > 20, "it was over before Serve would have cut it off"
        await until(lambda: is_running(nodes, "steady"), 10)  # no longer waits for the old
        await asyncio.to_thread(wait_until_ended, old_processes)
        assert accounts_for_all(record)
        assert set(record.count()) == {"done"}

    asyncio.run(scene())


def test_a_model_that_does_not_load_leaves_the_old_one_serving(nodes: RayNodes) -> None:
    broken = describe_steady(engine="torch", name="echo", path="/nowhere/llava")

    async def scene() -> None:
        async with run_clients(nodes.url, num_clients=4) as record:
            old = find_pids(nodes, "steady", "echo")
            nodes.deploy(broken, describe_elastic())
            told: list[str] = []

            def is_told() -> bool:
                deployments = nodes.read_application("steady").get("deployments", {})
                told[:] = [deployments.get("echo", {}).get("message", "")]
                return "/nowhere/llava" in told[0]

            await until(is_told)
            assert "there is no such folder" in told[0]
            assert find_pids(nodes, "steady", "echo") == old
        assert accounts_for_all(record)
        assert set(record.count()) == {"done"}

    asyncio.run(scene())
    nodes.deploy(describe_steady(messages_per_s=99), describe_elastic())
    wait_for(lambda: is_running(nodes, "steady"), 120)


def test_a_model_wakes_grows_shrinks_and_sleeps_without_a_failed_request(nodes: RayNodes) -> None:
    def count() -> int:
        return len(find_pids(nodes, "elastic", "sleeper"))

    async def scene() -> None:
        assert count() == 0
        url = f"{nodes.url}/elastic"
        async with run_clients(url, num_clients=12, model="sleeper") as record:
            await until(lambda: count() == 2)
        async with run_clients(url, num_clients=1, model="sleeper", max_tokens=200) as late:
            await until(lambda: count() == 1)
        assert set(record.count()) == set(late.count()) == {"done"}
        assert accounts_for_all(record)
        await until(lambda: count() == 0)

    asyncio.run(scene())


def test_ten_times_too_many_requests_for_a_minute_are_refused_at_once_and_soon_forgotten(
    nodes: RayNodes,
) -> None:
    num_words, lasts_s = 40, 60
    capacity_per_s = 2 * 2 / (num_words * WORD_S)  # of two gateways, two requests each
    url = f"{nodes.url}/elastic"

    async def scene() -> None:
        record = LoadRecord()
        memory = [measure_memory(nodes)]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=url, timeout=120, limits=limits, trust_env=False
        ) as client:

            def start() -> "asyncio.Task[Ask]":
                return asyncio.create_task(ask(client, record, model="small", max_tokens=num_words))

            calm = await start()
            asked: list[asyncio.Task[Ask]] = []
            started_at = time.monotonic()
            while (past_s := time.monotonic() - started_at) < lasts_s:
                if len(asked) < past_s * 10 * capacity_per_s:
                    asked.append(start())
                if len(memory) <= past_s / 5:
                    memory.append(measure_memory(nodes))
                await asyncio.sleep(0.01)
            over_at = time.monotonic()
            late = await start()
            while late.end != "done" or late.seconds > 1.5 * calm.seconds:
                await asyncio.sleep(0.2)
                late = await start()
            await asyncio.gather(*asked)
        tell_overload(record, memory, late.started_at - over_at)
        assert len(asked) > 9 * capacity_per_s * lasts_s
        assert late.started_at - over_at < 10, "it is still busy ten seconds after"
        assert record.num_started == len(record.asks)
        assert set(record.count()) == {"done", "refused"}
        for one in record.asks:
            if one.end == "refused":
                assert one.status in (429, 503)
                assert float(one.retry_after or 0) > 0
                assert one.why.startswith("overloaded")
                assert one.seconds < 1
            else:
                assert one.num_words == num_words
        assert record.count()["done"] > capacity_per_s * lasts_s / 4, "overload costs throughput"
        early, final = memory[3], memory[-1]
        for pid, size in early.items():
            assert final[pid] < 1.05 * size, f"process {pid} grew from {size} to {final[pid]} bytes"

    asyncio.run(scene())


def measure_memory(nodes: RayNodes) -> dict[int, int]:
    """Return the memory of each process that holds requests: proxy, gateways and replicas."""
    pids = find_pids(nodes, "elastic", "gateway") | find_pids(nodes, "elastic", "small")
    pids |= {pid for pid in nodes.nodes[0].pids if is_proxy(pid)}
    assert len(pids) == 4
    return {pid: psutil.Process(pid).memory_info().rss for pid in pids}


def is_proxy(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "ProxyActor" in " ".join(psutil.Process(pid).cmdline())
    return False


def tell_overload(record: LoadRecord, memory: list[dict[int, int]], recovered_s: float) -> None:
    """Print the figures for docs/cluster/operations.md."""
    waits = sorted(one.seconds for one in record.asks if one.end == "refused")
    done = sorted(one.seconds for one in record.asks if one.end == "done")
    sizes = [round(sum(each.values()) / 2**20) for each in memory]
    print(
        f"{len(waits)} of {len(record.asks)} refused, half within {waits[len(waits) // 2]:.3f} s, "
        f"all within {waits[-1]:.3f} s; the rest whole after {done[-1]:.1f} s at most; "
        f"as ever after {recovered_s:.1f} s; MB of memory: {sizes}"
    )


def test_a_job_ends_with_what_it_says_and_its_exit_code(nodes: RayNodes, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (32, 32)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(name)
    submit = ("job", "submit", "--address", nodes.dashboard, "--working-dir", str(ROOT), "--")
    convert = (*submit, "python", "jobs/convert.py")
    shards = tmp_path / "shards"
    files = ("--input", str(images), "--output", str(shards))
    converted = nodes.run_ray(*convert, "pairs", *files)
    assert converted.returncode == 0, converted.stdout
    assert "succeeded" in converted.stdout
    assert list(shards.glob("**/*.parquet"))
    failed = nodes.run_ray(*convert, "pears")
    assert failed.returncode == 1
    assert "pears" in failed.stdout
    assert "exit code" in failed.stdout


def test_a_job_that_is_stopped_leaves_nothing_behind(nodes: RayNodes) -> None:
    def run(*words: str) -> str:
        done = nodes.run_ray("job", words[0], "--address", nodes.dashboard, *words[1:])
        assert done.returncode == 0, done.stdout
        return done.stdout

    work = ("python", "-c", "import time; time.sleep(599)")
    run("submit", "--no-wait", "--submission-id=long", "--working-dir", str(ROOT), "--", *work)
    wait_for(lambda: any("sleep(599)" in command for command in list_commands(nodes)), 60)
    run("stop", "long")
    wait_for(lambda: "was stopped" in run("status", "long"), 60)
    wait_for(lambda: not any("sleep(599)" in each for each in list_commands(nodes)), 60)


def list_commands(nodes: RayNodes) -> list[str]:
    """Return the command lines of all processes of the cluster."""
    commands = []
    for pid in (pid for node in nodes.nodes for pid in node.list_alive()):
        with suppress(psutil.NoSuchProcess):
            commands.append(" ".join(psutil.Process(pid).cmdline()))
    return commands


def test_a_request_has_one_id_from_the_gateway_to_the_engine(nodes: RayNodes) -> None:
    asked = {"model": "small", "messages": [{"role": "user", "content": "a secret question"}]}
    answer = httpx.post(
        f"{nodes.url}/elastic/v1/chat/completions",
        json=asked,
        headers={"x-request-id": "from-a-client-7", "Authorization": "Bearer a-secret-key"},
        timeout=60,
        trust_env=False,
    )
    assert answer.headers["x-request-id"] == "from-a-client-7"
    wait_for(lambda: len(find_lines(nodes, "from-a-client-7")) >= 2, 30)
    gateway, replica = (find_lines(nodes, "from-a-client-7", of) for of in ("gateway", "small"))
    name = answer.json()["id"]
    assert [line for line in gateway if name in line["message"] and "200 POST" in line["message"]]
    assert [line for line in replica if f"{name} ended: stop" in line["message"]]


def find_lines(nodes: RayNodes, request_id: str, deployment: str = "") -> list[dict[str, Any]]:
    """Return the lines of Serve's logs about a request."""
    lines = []
    for path in list_logs(nodes):
        if path.parent.name == "serve" and deployment in path.name:
            text = path.read_text(errors="replace")
            lines += [json.loads(line) for line in re.findall(r"^\{.*\}$", text, re.MULTILINE)]
    return [line for line in lines if line.get("request_id") == request_id]


def test_no_log_and_no_command_line_has_a_secret(nodes: RayNodes) -> None:
    secrets = [nodes.token, "a-secret-key", "a secret question"]
    commands = list_commands(nodes)
    assert commands
    for secret in secrets:
        assert not [path for path in list_logs(nodes) if secret.encode() in path.read_bytes()]
        assert not [command for command in commands if secret in command]


def list_logs(nodes: RayNodes) -> list[Path]:
    logs = [path for path in nodes.folder.glob("node*/session_2*/logs/**/*") if path.is_file()]
    return [*logs, *nodes.folder.glob("node*.log")]
