"""A server with the OpenAI API whose answers never end, and which notices when a client leaves."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class EndlessServer(ThreadingHTTPServer):
    """Sends tokens without end; `abandoned` is set when a client closes the stream."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.abandoned = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: EndlessServer

    def do_GET(self) -> None:
        self._begin("application/json")
        self.wfile.write(json.dumps({"data": [{"id": "endless"}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._begin("text/event-stream")
        event = {"choices": [{"delta": {"content": "on and "}, "finish_reason": None}]}
        try:
            while not self.server.abandoned.wait(0.01):
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        except OSError:
            self.server.abandoned.set()

    def _begin(self, media_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Log nothing: the tests read what the client prints."""


@contextmanager
def run_endless_server() -> Iterator[EndlessServer]:
    with EndlessServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.abandoned.set()
            server.shutdown()
            thread.join()
