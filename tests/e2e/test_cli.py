"""The command line: chatting with and without a server, errors, the embedded model's commands."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image
from support.endless_openai import EndlessServer, run_endless_server
from support.wait import PATIENCE_S, wait_until_ready

from llava_ray.cli import main

pytestmark = pytest.mark.ray

Fail = Callable[..., tuple[object, str]]
COMMAND = [sys.executable, "-m", "llava_ray.cli"]


def run(*words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], input=typed, capture_output=True, text=True)


@pytest.fixture
def fail(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Run a command in this process; give its exit code and what it wrote to stderr."""

    def fail(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["llava-ray", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capfd.readouterr().err

    return fail


@pytest.fixture
def make_image(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (48, 48), "red").save(path)
    return str(path)


@pytest.fixture
def endless() -> Iterator[EndlessServer]:
    with run_endless_server() as server:
        yield server


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == "llava-ray 0.2.0\n"


def test_one_question_about_two_images_prints_the_answer_alone(served: str, image: str) -> None:
    asked = run("chat", image, image, "--url", served, "--prompt", "What is this?")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout == "What is this? (2 images)\n"


def test_a_conversation_takes_images_between_its_turns_and_can_be_cleared(
    served: str, image: str
) -> None:
    typed = f"hello\n/image {image}\nand now?\nstill there?\n/clear\ngone?\n/quit\nnever read\n"
    talk = run("chat", "--url", served, "--model", "other", typed=typed)
    assert talk.stdout.splitlines() == [
        "hello (0 images)",
        "and now? (1 images)",
        "still there? (1 images)",
        "gone? (0 images)",
    ]
    assert talk.returncode == 0


def test_without_a_server_the_engine_runs_in_the_process(image: str) -> None:
    asked = run("chat", image, "--local", "--engine", "echo", "-p", "What is this?")
    assert asked.stdout == "What is this? (1 images)\n"
    assert asked.returncode == 0


def test_a_mistake_in_a_conversation_does_not_end_it(served: str) -> None:
    talk = run("chat", "--url", served, typed="/image nowhere.png\n/imagine\nhello\n")
    assert "cannot read 'nowhere.png'" in talk.stderr
    assert "no such command: /imagine" in talk.stderr
    assert talk.stdout == "hello (0 images)\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(endless: EndlessServer) -> None:
    words = [*COMMAND, "chat", "--url", endless.url]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as talk:
        assert talk.stdin
        assert talk.stdout
        talk.stdin.write("begin\n")
        talk.stdin.flush()
        assert talk.stdout.read(6) == "on and"
        talk.send_signal(signal.SIGINT)
        assert endless.abandoned.wait(PATIENCE_S)
        _, told = talk.communicate("/clear\n", timeout=PATIENCE_S)
    assert "(stopped)" in told
    assert "a new conversation" in told
    assert talk.returncode == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chat", "--url", "http://127.0.0.1:9", "-p", "x"], "no server answers at"),
        (["chat", "--url", "ftp://here", "-p", "x"], "not the address of a server"),
        (["chat", "--url", "SERVED", "--model", "nope", "-p", "x"], "there is echo, other"),
        (["chat", "nowhere.png", "-p", "x"], "cannot read 'nowhere.png'"),
        (["chat", __file__, "-p", "x"], "not an image"),
        (["chat", "--local", "--url", "http://x", "-p", "x"], "give one of them"),
        (["chat", "--local", "--engine", "vllm", "-p", "x"], "needs vLLM, which is not installed"),
        (["serve", "--config", "nowhere.yaml"], "cannot read 'nowhere.yaml'"),
        (["demo", "evaluate", "nowhere"], "no weights in 'nowhere'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_mistake_ends_with_its_remedy_and_code_2(
    served: str, fail: Fail, words: list[str], told: str
) -> None:
    code, said = fail(*[served if word == "SERVED" else word for word in words])
    assert told in said.replace("\n", " ")
    assert said.startswith("error: ")
    assert code == 2


def test_a_setting_that_a_file_would_pass_over_is_refused(fail: Fail, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("models: [{path: demo}]")
    code, said = fail("serve", "--config", str(file), "--quantization", "int8")
    assert "quantization would have no effect" in said.replace("\n", " ")
    assert code == 2


def test_a_mistake_shows_no_traceback() -> None:
    failed = run("chat", "nowhere.png", "-p", "x")
    assert failed.stderr.startswith("error: cannot read 'nowhere.png'")
    assert "Traceback" not in failed.stderr
    assert failed.returncode == 2


def test_a_misspelt_setting_is_refused_with_the_right_one(fail: Fail, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("modles: []\n")
    code, said = fail("serve", "--config", str(path))
    assert "did you mean models?" in said
    assert code == 2


def test_a_serve_config_file_is_sent_to_the_right_command(fail: Fail, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("applications: []\n")
    code, said = fail("serve", "--config", str(path))
    assert f"`serve run {path}`" in said.replace("\n", "")
    assert code == 2


def test_the_same_seed_draws_the_same_scene_and_asks_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    asked = [run("demo", "scene", str(path), "--seed", "7").stdout for path in (first, second)]
    assert asked[0] == asked[1]
    assert len(asked[0].splitlines()) >= 2
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_serve_answers_on_its_port_until_it_is_stopped(ending: signal.Signals) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    words = [*COMMAND, "serve", "echo", "--engine", "echo", "--no-page", "--port", port]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            told = next(line for line in server.stderr if "Ctrl-C" in line)
            ready = wait_until_ready(f"http://127.0.0.1:{port}")
            below = psutil.Process(server.pid).children(recursive=True)
            policies = {os.sched_getscheduler(process.pid) for process in below}
            server.send_signal(ending)
            _, rest = server.communicate(timeout=2 * PATIENCE_S)
        finally:
            server.kill()  # or leaving the block waits for ever for one that does not end
    assert port in told
    assert ready["models"] == {"echo": "ready"}
    assert policies == {os.SCHED_BATCH}, "Ray's processes cut off an engine's threads"
    assert "Traceback" not in rest
    assert "***" not in rest
    assert server.returncode == 0
