"""The life of a cluster: `ray up` over ssh, `serve deploy`, a chat, jobs, `ray down`.

The machines are network namespaces. Run it with `TEST_CLUSTER=1 pytest -m cluster`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import network_hosts
from tests.support.benchmark_files import write_lines
from tests.support.tiny_checkpoint import make_image, tiny_model

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "jobs" / "configs" / "cluster_local.yaml"
missing = "" if "TEST_CLUSTER" not in os.environ else network_hosts.find_missing()

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="wants the whole machine"),
    pytest.mark.skipif(bool(missing), reason=missing or "it can run"),
]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[network_hosts.Host]]:
    """A laptop, a head and a worker; Ray is not running on them."""
    folder = tmp_path_factory.mktemp("hosts")
    with network_hosts.start_hosts(folder, num_hosts=3) as machines:
        (folder / "cluster.yaml").write_text(describe_cluster(machines, folder / "key"))
        yield machines


def describe_cluster(machines: list[network_hosts.Host], key: Path) -> str:
    """Return the shipped cluster file for these machines, on which everything is installed."""
    config = yaml.safe_load(CLUSTER.read_text())
    _, head, worker = (machine.address for machine in machines)
    config["provider"] |= {"head_ip": head, "worker_ips": [worker]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    environment = (
        f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH=~/llava_ray "
        "RAY_AUTH_MODE=token RAY_DISABLE_MEMORY_MONITOR=1"
    )
    config["setup_commands"] = [f"echo '{environment}' > ~/.bashrc"]
    return yaml.safe_dump(config)


def test_a_cluster_comes_up_serves_works_and_goes_without_a_trace(
    machines: list[network_hosts.Host], tmp_path: Path
) -> None:
    laptop, head, worker = machines
    file = laptop.home.parent.parent / "cluster.yaml"

    def do(command: str, *, expect: int = 0) -> str:
        """Run a command on the laptop, in the checkout."""
        run = laptop.run(f"cd {ROOT} && {command}", timeout_s=300, RAY_USAGE_STATS_ENABLED="0")
        assert run.returncode == expect, f"{command}: {run.returncode}\n{run.stdout[-6000:]}"
        return run.stdout

    def execute(command: str, *, expect: int = 0) -> str:
        return do(f"ray exec {file} 'cd llava_ray && {command}'", expect=expect)

    do("ray get-auth-token --generate")
    do(f"ray up -y {file}")
    wait_for(lambda: "2 local.cluster.node" in execute("ray status"), 60)

    execute("serve deploy jobs/configs/serve.yaml")
    url = f"http://{head.address}:8000"
    wait_for(lambda: laptop.run(f"curl -fsS {url}/readyz").returncode == 0, 240)
    question = {"role": "user", "content": "How many objects are there?"}
    body = json.dumps({"model": "llava-ray-demo", "messages": [question], "temperature": 0})
    answer = json.loads(do(f"curl -sS {url}/v1/chat/completions -d '{body}'"))
    assert "no image" in answer["choices"][0]["message"]["content"]
    wait_for(lambda: "gradio" in laptop.run(f"curl -sSL {url}/ui/").stdout, 60)

    submit = "ray job submit --working-dir . -- python"
    shards = write_images(tmp_path)
    execute(f"{submit} jobs/convert.py pairs --input {tmp_path} --output {shards}")
    run = describe_training(tmp_path, shards)
    said = execute(f"{submit} jobs/train.py {run} max_steps=2")
    assert "succeeded" in said
    assert (tmp_path / "run" / "export" / "model.safetensors").exists(), said
    question = {"question_id": 1, "text": "Which number?", "answer": "1"}
    write_lines(tmp_path / "questions" / "questions.jsonl", [question])
    measured = f"--model {tmp_path}/run/export --tasks own_exact --num-cpus 0.5"
    measured += f" --data {tmp_path}/questions --output {tmp_path}/scores"
    assert "succeeded" in execute(f"{submit} jobs/evaluate.py {measured}")
    assert (tmp_path / "scores" / "samples_own_exact.jsonl").exists()
    timed = execute(f"{submit} jobs/benchmark.py load --model llava_ray/demo/model --runs 1")
    assert '"system": "llava_ray"' in timed
    assert "exit code 3" in execute(f'{submit} -c "raise SystemExit(3)"', expect=1)

    token = (laptop.home / ".ray" / "auth_token").read_text()
    asked = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/"
    assert head.run(asked).stdout == "401"
    assert head.run(f"{asked} -H 'Authorization: Bearer {token}'").stdout == "200"
    assert laptop.run(f"curl -s http://{head.address}:8265").returncode == 7  # no connection
    for machine in (head, worker):
        assert token not in "\n".join(machine.list_processes())
        assert machine.run(f"grep -rqF {token} /tmp/ray").returncode == 1, "a log has the token"

    do(f"ray down -y {file}")
    wait_for(lambda: not head.list_processes() and not worker.list_processes(), 150)


def write_images(folder: Path) -> Path:
    """Write images with captions; return a path for their shards."""
    for number in range(8):
        make_image(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder / "shards"


def describe_training(folder: Path, shards: Path) -> Path:
    """Write the settings of a run that trains a tiny projector on the worker."""
    config = {
        "name": "run",
        "model": str(tiny_model()),
        "template": "plain",
        "method": "projector",
        "output_dir": str(folder),
        "data": {"datasets": [{"path": str(shards)}], "num_readers": 1, "reader_cpus": 0},
        "num_workers": 1,
        "cpus_per_worker": 0.5,
        "train_batch_size": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "bf16": False,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def wait_for(is_true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(1)
