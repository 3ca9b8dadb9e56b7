"""A stand-in for LLaVA's own model worker: a real HTTP server with its routes, without a model.

It repeats the question word by word, each time after the whole prompt. The words `fail`, `break`
and `trim` in a prompt make it behave accordingly.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

ERROR = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"


class LlavaWorker:
    """Serves one model on a free port of loopback; a context manager.

    Attributes:
        asked: the bodies received at `/worker_generate_stream`.
    """

    def __init__(self, model: str, *, queue_length: int = 0) -> None:
        self.model, self.queue_length = model, queue_length
        self.asked: list[dict[str, Any]] = []
        worker = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.close_connection = True
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                if self.path == "/worker_get_status":
                    self.send(json.dumps(worker.status).encode())
                elif self.path == "/worker_generate_stream":
                    worker.asked.append(json.loads(body))
                    for item in worker.answer(worker.asked[-1]):
                        if item is None:
                            return  # without the end that HTTP expects
                        self.send(json.dumps(item).encode() + b"\0")
                self.send(b"")

            def send(self, piece: bytes) -> None:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def status(self) -> dict[str, Any]:
        return {"model_names": [self.model], "speed": 1, "queue_length": self.queue_length}

    @property
    def registration(self) -> dict[str, Any]:
        """What it posts to a controller's `/register_worker`."""
        return {
            "worker_name": self.address,
            "check_heart_beat": True,
            "worker_status": self.status,
        }

    def answer(self, body: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        """Yield the objects of an answer; None where the connection breaks."""
        prompt = body["prompt"]
        question = prompt.rpartition("USER: ")[2].removesuffix(" ASSISTANT:")
        said = ""
        for number, word in enumerate(question.replace("<image>", "").split()):
            if number == 2 and "fail" in question:
                yield {"text": ERROR, "error_code": 1}
                return
            if number == 2 and "break" in question:
                yield None
            said += f" {word}"
            yield {"text": prompt + said, "error_code": 0}
        if "trim" in question:
            yield {"text": prompt + said + "##", "error_code": 0}
            yield {"text": prompt + said, "error_code": 0}
            yield {"text": prompt + said + " and so on", "error_code": 0}

    def close(self) -> None:
        """Stop the worker: its port refuses connections from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
