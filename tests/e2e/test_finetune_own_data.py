"""The eight commands of docs/finetune-your-own-data.md on easy-VQA, with less training."""

import asyncio
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_ray.client import Client
from llava_ray.types import ChatRequest, ImagePart, Message, Sampling, TextPart
from tests.support.wait import PATIENCE_S, wait_until_ready

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "finetune-your-own-data.md").read_text()
MAX_STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which all commands of the guide but the last, `serve`, have run."""
    pytest.importorskip("easy_vqa")
    folder = tmp_path_factory.mktemp("own")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    block = re.search(r"## Eight commands\n+```bash\n(.*?)```", GUIDE, re.DOTALL)
    assert block
    commands = [shlex.split(line) for line in block[1].splitlines()]
    assert len(commands) == 8
    assert commands[-1] == ["llava-ray", "serve", "outputs/my-llava/export"]
    for words in commands[:-1]:
        program = {"python": [], "llava-ray": ["-m", "llava_ray.cli"]}[words[0]]
        more = [f"max_steps={MAX_STEPS}"] if words[1] == "train" else []
        done = subprocess.run(
            [sys.executable, *program, *words[1:], *more],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout}\n{done.stderr}"
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The address of the fine-tuned model, served by the guide's last command."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    words = [sys.executable, "-m", "llava_ray.cli", "serve", "outputs/my-llava/export"]
    with subprocess.Popen(
        [*words, "--no-page", "--port", port],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
            process.terminate()
            process.wait(PATIENCE_S)
        finally:
            process.kill()


def test_most_questions_are_answered_after_a_few_steps(folder: Path) -> None:
    results = json.loads((folder / "outputs/my-llava/scores/results.json").read_text())
    task = results["tasks"]["own_exact"]
    assert task["num_scored"] == 500
    assert task["headline"]["value"] > 50


def test_the_served_model_answers_as_in_the_evaluation(folder: Path, server: str) -> None:
    lines = (folder / "outputs/my-llava/scores/samples_own_exact.jsonl").read_text().splitlines()
    sample = json.loads(lines[0])
    image = (folder / sample["images"][0]).read_bytes()

    async def ask() -> str:
        client = Client(server)
        message = Message("user", (ImagePart(image), TextPart(sample["prompt"])))
        name = (await client.list_models())[0]
        request = ChatRequest("own", name, (message,), Sampling(max_tokens=16, temperature=0.0))
        chunks = [chunk.text async for chunk in client.stream(request)]
        await client.close()
        return "".join(chunks)

    assert asyncio.run(ask()) == sample["response"]
