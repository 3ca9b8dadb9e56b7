"""A server with the OpenAI API on a port of loopback whose responses come from a script."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Script = Callable[[str], str | bytes | int | None]
"""What was asked -> the answer; a whole body; a status to refuse with; None: hang up midway."""


class ScriptedOpenAI:
    """Serves the model "scripted"; a context manager.

    Attributes:
        asked: bodies of the chat completions received.
        keys: the Authorization header of each.
        fingerprint: `system_fingerprint` of the responses; None: they have none.
        owner: the model's `owned_by` in `/v1/models`.
    """

    def __init__(
        self, script: Script, *, fingerprint: str | None = None, owner: str = "somebody"
    ) -> None:
        self.fingerprint, self.owner = fingerprint, owner
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                model = {"id": "scripted", "owned_by": server.owner}
                self.reply(200, {"object": "list", "data": [model]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                server.keys.append(self.headers.get("Authorization"))
                said = script(read_text(body))
                if isinstance(said, bytes):
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(said)
                    return
                if isinstance(said, int):
                    self.reply(said, {"error": {"message": "the script says no", "code": None}})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.send({"choices": [{"delta": {"content": said or "bro"}, **end(None)}]})
                if said is not None:
                    self.send({"choices": [{"delta": {}, **end("stop")}]})
                    self.wfile.write(b"data: [DONE]\n\n")

            def reply(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def send(self, event: Any) -> None:
                if server.fingerprint:
                    event = {**event, "system_fingerprint": server.fingerprint}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def end(reason: str | None) -> dict[str, Any]:
    return {"index": 0, "finish_reason": reason}


def read_text(body: dict[str, Any]) -> str:
    """Return the text of the last message of a request."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
