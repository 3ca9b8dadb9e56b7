"""A Ray cluster of a test's own: nodes are processes of this machine, each of which can be killed.

Tests control it over HTTP, as an operator does: Serve's configuration is sent to the dashboard, and
the state of applications is read from there. Token authentication is on.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
_RAY = str(Path(sys.executable).parent / "ray")


class RayNode:
    """One node: `ray start` and all processes that it has started."""

    def __init__(self, folder: Path, log: Path, *options: str, **environment: str) -> None:
        self.log = log
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command = [_RAY, "start", "--block", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--dashboard-agent-listen-port={find_port()}", "--disable-usage-stats"]
        with log.open("wb") as output:
            self._first = subprocess.Popen(
                [*command, *options],
                cwd=folder,
                env={**clean, "PYTHONPATH": str(ROOT), **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pids(self) -> set[int]:
        """Of all processes of this node."""
        first = psutil.Process(self._first.pid)
        return {first.pid, *(child.pid for child in first.children(recursive=True))}

    def list_alive(self) -> set[int]:
        """Return its running processes; none after it was killed."""
        return set() if self._first.poll() is not None else self.pids

    def kill(self) -> None:
        """Kill all processes of the node at once, as if the machine had failed."""
        with suppress(psutil.NoSuchProcess):
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._first.wait()


class RayNodes:
    """A head, by default without CPUs for work, and workers.

    Attributes:
        url: address of Serve's HTTP port.
        dashboard: address of Ray's dashboard.
        token: token of Ray's authentication.
        folder: contains a folder for each node, with Ray's logs.
    """

    def __init__(self, folder: Path, *, head_cpus: float = 0, **environment: str) -> None:
        self.folder, self._gcs = folder, f"127.0.0.1:{find_port()}"
        self.token = secrets.token_hex(32)
        self._port = find_port()
        self.url = f"http://127.0.0.1:{self._port}"
        dashboard_port = find_port()
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        self._environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_DISABLE_MEMORY_MONITOR": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            **environment,
        }
        self.nodes: list[RayNode] = []
        self._client = httpx.Client(
            base_url=self.dashboard,
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=60,
            trust_env=False,
        )
        self._add(
            "--head",
            f"--port={self._gcs.rpartition(':')[2]}",
            f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={find_port()}",
            num_cpus=head_cpus,
        )

    def add_worker(self, *, num_cpus: float = 2) -> RayNode:
        return self._add(f"--address={self._gcs}", num_cpus=num_cpus)

    def deploy(self, *applications: dict[str, Any]) -> None:
        """Deploy these applications with Serve, in place of any others."""
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self._port},
            "applications": list(applications),
        }
        response = self._client.put("/api/serve/applications/", json=config)
        assert response.status_code == 200, response.text

    def read_application(self, name: str) -> dict[str, Any]:
        """Return Serve's details of an application; empty if there is none of that name."""
        response = self._client.get("/api/serve/applications/")
        return response.raise_for_status().json()["applications"].get(name, {})

    def list_replicas(self, application: str, deployment: str) -> list[dict[str, Any]]:
        """Return Serve's details of the running replicas."""
        found = self.read_application(application).get("deployments", {}).get(deployment, {})
        return [each for each in found.get("replicas", []) if each["state"] == "RUNNING"]

    def count_nodes(self) -> int:
        """Return the number of nodes that Ray considers alive."""
        response = self._client.get("/api/v0/nodes?limit=100").raise_for_status().json()
        nodes = response["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def run_ray(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run one of Ray's commands against this cluster."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        own = {"RAY_ADDRESS": self._gcs, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [_RAY, *words],
            env={**clean, **self._environment, **own, **environment},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )

    def close(self) -> None:
        self._client.close()
        for node in reversed(self.nodes):
            node.kill()

    def _add(self, *options: str, num_cpus: float) -> RayNode:
        folder = self.folder / f"node{len(self.nodes)}"  # its own, as on another machine
        log = folder.with_suffix(".log")
        options = (*options, f"--temp-dir={folder}", f"--num-cpus={num_cpus:g}", "--num-gpus=0")
        options = (*options, "--object-store-memory=100000000")
        self.nodes.append(RayNode(self.folder, log, *options, **self._environment))
        return self.nodes[-1]


@contextmanager
def start_nodes(
    *, num_workers: int, head_cpus: float = 0, **environment: str
) -> Iterator[RayNodes]:
    """Start a head and workers, and kill all of them at the end of the block."""
    # A short path: Ray's sockets are below it, whose names must not exceed 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        nodes = RayNodes(Path(name), head_cpus=head_cpus, **environment)
        try:
            wait_for(lambda: is_up(nodes), 120, lambda: nodes.nodes[0].log.read_text())
            for n in range(num_workers):  # one by one: on one machine they would take each other's
                nodes.add_worker()  # names of sockets
                wait_for(lambda n=n: nodes.count_nodes() == n + 2, 120)
            yield nodes
        finally:
            nodes.close()


def is_up(nodes: RayNodes) -> bool:
    try:
        return bool(nodes.count_nodes())
    except httpx.HTTPError:
        return False


def wait_for(
    is_true: Callable[[], bool], timeout_s: float, explain: Callable[[], Any] = lambda: ""
) -> float:
    """Return after how many seconds it was true."""
    started = time.monotonic()
    while not is_true():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s:g} s: {explain()}"
        time.sleep(0.2)
    return time.monotonic() - started


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
