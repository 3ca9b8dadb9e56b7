"""The life of a cluster, for real: `ray up` over ssh, serve, chat, a job, `ray down`."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hosts
import pytest
import yaml

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "jobs" / "configs" / "cluster_local.yaml"
DASHBOARD = dict.fromkeys(("RAY_ADDRESS", "RAY_DASHBOARD_ADDRESS"), "http://127.0.0.1:8265")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(hosts.find_missing()), reason=hosts.find_missing() or "it can run"),
]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[hosts.Host]]:
    """A laptop, a head and a worker, without Ray."""
    folder = tmp_path_factory.mktemp("hosts")
    with hosts.start_hosts(folder, num_hosts=3) as machines:
        (folder / "cluster.yaml").write_text(describe_cluster(machines, folder / "key"))
        yield machines


def describe_cluster(machines: list[hosts.Host], key: Path) -> str:
    """The shipped file for these machines, where Python and its packages are installed already."""
    config = yaml.safe_load(CLUSTER.read_text())
    _, head, worker = (machine.address for machine in machines)
    config["provider"] |= {"head_ip": head, "worker_ips": [worker]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    environment = (
        f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH=~/llava_ray "
        "RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_DISABLE_MEMORY_MONITOR=1 "
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S=60"
    )
    config["setup_commands"] = [f"echo '{environment}' > ~/.bashrc"]
    return yaml.safe_dump(config)


def test_a_cluster_comes_up_serves_works_and_goes_without_a_trace(
    machines: list[hosts.Host],
) -> None:
    laptop, head, worker = machines
    file = laptop.home.parent.parent / "cluster.yaml"

    def ray(command: str, *, expect: int = 0, **environment: str) -> str:
        run = laptop.run(
            f"cd {ROOT} && {command}", timeout_s=300, RAY_AUTH_MODE="token", **environment
        )
        assert run.returncode == expect, f"{command}: {run.returncode}\n{run.stdout[-6000:]}"
        return run.stdout

    ray("ray get-auth-token --generate")
    token = (laptop.home / ".ray" / "auth_token").read_text()
    ray(f"ray up -y --no-config-cache {file}")
    with forward_dashboard(laptop, file):
        ray("serve deploy jobs/configs/serve.yaml", **DASHBOARD)
        url = f"http://{head.address}:8000"
        wait_for(lambda: laptop.run(f"curl -fsS {url}/readyz").returncode == 0, 240)
        question = {"role": "user", "content": "How many objects are there?"}
        body = json.dumps({"model": "llava-ray-demo", "messages": [question], "temperature": 0})
        answer = json.loads(ray(f"curl -sS {url}/v1/chat/completions -d '{body}'"))
        assert "no picture" in answer["choices"][0]["message"]["content"]
        assert "gradio" in ray(f"curl -fsSL {url}/ui/")

        job = "ray job submit --working-dir . --"
        benchmark = "python jobs/benchmark.py load --model llava_ray/demo/model --runs 1"
        assert '"system": "llava_ray"' in ray(f"{job} {benchmark}", **DASHBOARD)
        assert "exit code 3" in ray(f'{job} python -c "raise SystemExit(3)"', expect=1, **DASHBOARD)

        asked = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/"
        assert head.run(asked).stdout == "401"
        assert head.run(f"{asked} -H 'Authorization: Bearer {token}'").stdout == "200"
        assert laptop.run(f"curl -s http://{head.address}:8265").returncode == 7  # no connection
    for machine in (head, worker):
        assert token not in "\n".join(machine.list_processes())
        assert machine.run(f"grep -rqF {token} /tmp/ray").returncode == 1, "a log has the token"
    ray(f"ray down -y {file}")
    wait_for(lambda: not head.list_processes() and not worker.list_processes(), 30)


@contextmanager
def forward_dashboard(laptop: hosts.Host, file: Path) -> Iterator[None]:
    """`ray dashboard`, which brings the head's dashboard to the laptop, while the block runs."""
    with laptop.start(f"ray dashboard {file}", RAY_AUTH_MODE="token"):
        asked = f"curl -s {DASHBOARD['RAY_ADDRESS']}"
        wait_for(lambda: laptop.run(asked).returncode == 0, 60)
        yield


def wait_for(is_true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(1)
