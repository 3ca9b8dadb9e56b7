"""Machines for a test: network namespaces with sshd, on a private network.

Each has its own addresses, processes, home and `/tmp/ray`, and shares the rest of the file system.
All of it ends with its first process. Linux only; needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NEEDED = ("ip", "nsenter", "rsync", "ssh", "ssh-keygen", "sshd", "unshare")
_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"

_BOOT = """
set -eu
mount --make-rprivate /
mkdir -p /tmp/ray /run/sshd
mount --bind {folder}/ray /tmp/ray
mount --bind {folder}/passwd /etc/passwd
touch {folder}/booted
while ! ip link set lo up || ! ip addr show eth0 2>/dev/null | grep -q inet; do sleep 0.1; done
exec {sshd} -D -e -f {folder}/sshd_config
"""
_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/../key.pub
StrictModes no
UsePAM no
PidFile none
"""


class Host:
    """One machine: its address, and the first process of its namespaces."""

    def __init__(self, address: str, folder: Path, first: "subprocess.Popen[bytes]") -> None:
        self.address, self.home = address, folder / "home"
        self._first = first

    @property
    def pid(self) -> int:
        """Of `unshare`'s child, which the namespaces belong to."""
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        return int(children.read_text().split()[0])

    def run(
        self, command: str, *, timeout_s: float = 120, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a shell command on the machine."""
        return subprocess.run(
            self._enter(command),
            env=self._environment(environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )

    @contextmanager
    def start(self, command: str, **environment: str) -> "Iterator[subprocess.Popen[bytes]]":
        """Run a command on the machine during the block; its output goes to `home/started.log`."""
        with (self.home / "started.log").open("wb") as log:
            running = subprocess.Popen(
                self._enter(command), env=self._environment(environment), stdout=log, stderr=log
            )
        try:
            yield running
        finally:
            running.kill()
            running.wait()

    def _enter(self, command: str) -> list[str]:
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid"]
        return [*enter, "bash", "-c", command]

    def _environment(self, added: dict[str, str]) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {**clean, "PATH": _PATH, "HOME": str(self.home), **added}

    def list_processes(self) -> list[str]:
        """Return the command lines of the machine's processes, without sshd and its sessions."""
        lines = self.run("ps -eo args=").stdout.splitlines()
        return [line for line in lines if "ps -eo args=" not in line and "sshd" not in line]


def find_missing() -> str:
    """Return why such machines are not possible here; empty if they are."""
    missing = [name for name in NEEDED if not shutil.which(name, path=_PATH)]
    if sys.platform != "linux" or os.geteuid() != 0:
        return "machines of a test's own are network namespaces: they need Linux and root"
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "this system makes no network namespaces"
    return ""


@contextmanager
def start_hosts(folder: Path, *, num_hosts: int) -> Iterator[list[Host]]:
    """Start machines that reach each other over ssh with the key `folder/key`."""
    _make_key(folder / "key")
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(_start_host(folder / f"host{n}", f"10.77.0.{n + 1}"))
            for n in range(num_hosts)
        ]
        _connect(hosts)
        yield hosts


@contextmanager
def _start_host(folder: Path, address: str) -> Iterator[Host]:
    home = folder / "home"
    for each in (home / ".ssh", folder / "ray"):
        each.mkdir(parents=True)
    (home / ".ssh" / "config").write_text("Host *\n  StrictHostKeyChecking no\n")
    (home / ".bashrc").touch()
    (home / ".bash_profile").write_text(". ~/.bashrc\n")
    passwd = Path("/etc/passwd").read_text().splitlines()
    others = [line for line in passwd if not line.startswith("root:")]
    root = f"root:x:0:0:root:{home}:/bin/bash"
    (folder / "passwd").write_text("\n".join([root, *others]) + "\n")
    _make_key(folder / "host_key")
    (folder / "sshd_config").write_text(_SSHD.format(address=address, folder=folder))
    sshd = shutil.which("sshd", path=_PATH)
    unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with (folder / "sshd.log").open("wb") as log:
        first = subprocess.Popen(
            [*unshare, "bash", "-c", _BOOT.format(folder=folder, sshd=sshd)],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 30
        while not (folder / "booted").exists():
            assert first.poll() is None, (folder / "sshd.log").read_text()
            assert time.monotonic() < deadline, "the machine did not start within 30 s"
            time.sleep(0.05)
        yield Host(address, folder, first)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()


def _connect(hosts: list[Host]) -> None:
    """Create a bridge in the first machine, and connect each machine to it."""
    hub = hosts[0]
    lines = ["ip link add hub type bridge", "ip link set hub up"]
    for n, host in enumerate(hosts):
        lines += [
            f"ip link add port{n} type veth peer name cable{n}",
            f"ip link set port{n} master hub up",
        ]
        if host is not hub:
            lines.append(f"ip link set cable{n} netns /proc/{host.pid}/ns/net")
    _ip(hub, lines)
    for n, host in enumerate(hosts):
        _ip(
            host,
            [
                f"ip link set cable{n} name eth0",
                f"ip addr add {host.address}/24 dev eth0",
                "ip link set eth0 up",
                "ip link set lo up",
                "ip route add default dev eth0",
            ],
        )


def _ip(host: Host, lines: list[str]) -> None:
    """Run `ip` in the network of a machine, with the processes of this one in sight."""
    enter = ["nsenter", f"--net=/proc/{host.pid}/ns/net"]
    subprocess.run([*enter, "bash", "-ec", "\n".join(lines)], check=True, timeout=30)


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, timeout=30)
