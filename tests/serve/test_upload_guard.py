"""What anybody may send to the page: raw calls of Gradio's API that no browser makes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from llava_ray.serve.page import upload_guard
from llava_ray.serve.page.store import make_store
from tests.support.local_page import (
    PARAMETERS,
    ScriptedGateway,
    Visitor,
    red_png,
    run_page,
    said,
    texts,
)
from tests.support.wait import PATIENCE_S

META = {"_type": "gradio.FileData"}
get = partial(httpx.get, timeout=PATIENCE_S)
post = partial(httpx.post, timeout=PATIENCE_S)
request = partial(httpx.request, timeout=PATIENCE_S)
REFUSED = r"not uploaded here|components are not accepted"
SECRET = "the operator's own words"


class Trap(ThreadingHTTPServer):
    """Another server on this machine, which must not receive a request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _TrapHandler)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/secret.png"


class _TrapHandler(BaseHTTPRequestHandler):
    server: Trap

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SECRET.encode())


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    with run_page(ScriptedGateway()) as address:
        yield address


@pytest.fixture
def trap() -> Iterator[Trap]:
    with Trap() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file in the page's working directory, which Gradio by itself would serve."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.png").write_text(SECRET)
    return str(tmp_path / "secret.png")


def file(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": META, **more}


def message(content: Any) -> list[Any]:
    return [{"role": "user", "content": [content]}]


def call_answer(chat: list[Any]) -> tuple[Any, ...]:
    return ("answer", chat, [], "echo", "", False, *PARAMETERS)


def calls(path: str) -> dict[str, tuple[Any, ...]]:
    """Return every call in which a visitor can name a file, by where the name is."""
    component = {"type": "component", "component": "image", "value": file(path), "props": {}}
    return {
        "a file of the chat": call_answer(message({"type": "file", "file": file(path)})),
        "a file that says it is a stream": call_answer(
            message({"type": "file", "file": file(path, is_stream=True)})
        ),
        "a file without its mark": call_answer(message({"type": "file", "file": {"path": path}})),
        "its address": call_answer(message({"type": "file", "file": file("x.png", url=path)})),
        "a component": call_answer(message({**component, "constructor_args": {}})),
        "what a component is built with": call_answer(
            message({**component, "value": None, "constructor_args": {"value": path}})
        ),
        "an older answer": call_answer(
            [{"role": "assistant", "content": [{"type": "file", "file": file(path)}]}, said("Hi")]
        ),
        "the second chat": (
            *("answer", [said("Hi")], message({"type": "file", "file": file(path)})),
            *("echo", "other", True, *PARAMETERS),
        ),
        "the box": ("add", {"text": "?", "files": [file(path)]}, [], [], False),
        "the camera": ("add_image", file(path), {"text": "", "files": []}),
        "the download": ("save", message({"type": "file", "file": file(path)}), []),
        "a setting": ("answer", [said("Hi")], [], "echo", "", False, file(path), 0.7, 9, "pad"),
    }


@pytest.mark.parametrize("place", calls(""))
def test_a_file_that_is_no_upload_is_refused(page: str, place: str, secret: str) -> None:
    visitor = Visitor(page)
    for path in (secret, "secret.png", "/etc/passwd", f"{page}/../etc/passwd", "\0"):
        with pytest.raises(RuntimeError, match=REFUSED):
            list(visitor.run(*calls(path)[place]))


@pytest.mark.parametrize("place", calls(""))
def test_no_address_is_fetched(page: str, place: str, trap: Trap) -> None:
    visitor = Visitor(page)
    for url in (trap.url, trap.url.replace("http://", "HTTP://"), trap.url + "?x=/tmp/a.png"):
        with pytest.raises(RuntimeError, match=REFUSED):
            list(visitor.run(*calls(url)[place]))
    assert trap.asked == []


def test_an_upload_beside_an_address_is_read_and_the_address_is_not(page: str, trap: Trap) -> None:
    visitor = Visitor(page)
    upload = {**visitor.upload("red.png", red_png()), "url": trap.url}
    assert "(1 images)" in visitor.answer([said("What?", upload)])[-1][-2]
    assert trap.asked == []


def test_an_example_is_chosen_by_its_number_alone(page: str, secret: str, trap: Trap) -> None:
    visitor = Visitor(page)
    data = {"index": 1, "value": {"text": "mine", "files": [file(trap.url, url=trap.url)]}}
    ((chat, _),) = visitor.run("add_example", [], [], False, event_data=data)
    assert texts(chat) == ["Is the blue star below the square?"]
    assert trap.url not in str(chat)
    assert trap.asked == []
    data["value"] = {"text": "mine", "files": [file(secret)]}
    with pytest.raises(RuntimeError, match="not in the cache"):
        list(visitor.run("add_example", [], [], False, event_data=data))


def test_what_is_nested_too_deeply_is_refused(page: str) -> None:
    deep: Any = "x"
    for _ in range(50):
        deep = [deep]
    with pytest.raises(RuntimeError, match="too deeply"):
        list(Visitor(page).run("answer", [said("Hi")], deep, "echo", "", False, *PARAMETERS))


@pytest.mark.parametrize(
    "path",
    [
        "proxy=http://127.0.0.1:9/",
        "file=http://127.0.0.1:9/x.png",
        "file=//127.0.0.1/share/x.png",
        "component_server",
        "run/answer",
        "api/answer",
        "call/answer",
        "call/v2/answer",
        "stream/x",
        "process_recording",
        "deep_link?session_hash=x",
        "vibe-code",
        "dev/reload",
        "runs",
    ],
)
def test_routes_that_the_page_does_not_use_are_closed(page: str, path: str) -> None:
    for method in ("GET", "POST"):
        answer = request(method, f"{page}/gradio_api/{path}", json={"data": []})
        assert answer.status_code == 404


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "pyproject.toml"])
def test_files_of_the_server_are_not_given_out(page: str, path: str) -> None:
    for asked in (path, "%2e%2e/" * 9 + path.lstrip("/")):
        answer = get(f"{page}/gradio_api/file={asked}")
        assert answer.status_code in (403, 404)


def test_too_much_at_once_is_refused(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_guard, "MAX_UPLOAD_BYTES", 1000)
    monkeypatch.setattr(upload_guard, "MAX_EVENT_BYTES", 1000)
    files = [("files", (f"{number}.png", b"x" * 400)) for number in range(3)]
    assert post(f"{page}/gradio_api/upload", files=files).status_code == 413
    body = b'{"data": ["' + b"x" * 1000
    assert post(f"{page}/gradio_api/queue/join", content=body).status_code == 413
    # Without a length: it is cut off where it is too long.
    pieces = iter([b"x" * 900, b"y" * 900])
    assert post(f"{page}/gradio_api/queue/join", content=pieces).status_code == 400


def test_a_full_store_takes_no_more_images(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_guard, "MAX_STORE_BYTES", 10)
    answer = post(f"{page}/gradio_api/upload", files={"files": ("a.png", red_png())})
    assert (answer.status_code, "try again later" in answer.text) == (507, True)


def test_old_uploads_are_deleted_and_examples_are_not() -> None:
    with run_page(ScriptedGateway(), uploads_kept_s=1) as address:
        visitor = Visitor(address)
        upload = visitor.upload("red.png", red_png())
        deadline = time.monotonic() + PATIENCE_S
        while Path(upload["path"]).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with pytest.raises(RuntimeError, match="has been deleted"):
            visitor.answer([said("What?", upload)])
        data = {"index": 0, "value": None}
        ((chat, _),) = visitor.run("add_example", [], [], False, event_data=data)
        assert Path(chat[0]["content"][0]["file"]["path"]).exists()


def test_what_a_page_left_that_was_killed_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    code = f"""if True:
        import os, pathlib
        from llava_ray.serve.page.store import make_store
        folder = make_store(pathlib.Path({str(tmp_path)!r}))
        pathlib.Path(folder, "upload.png").touch()
        print(folder, flush=True)
        input()"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout
        theirs = Path(other.stdout.readline().strip())
        ours = Path(make_store(tmp_path))
        assert {path.name for path in tmp_path.iterdir()} == {theirs.name, ours.name}
        other.kill()
        other.wait()
        third = Path(make_store(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {ours.name, third.name}
