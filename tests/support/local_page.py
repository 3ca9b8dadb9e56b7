"""A page over a scripted gateway, without Ray, and its visitors."""

import asyncio
import io
import json
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from gradio_client.utils import apply_diff
from PIL import Image

from llava_ray.config import PageConfig
from llava_ray.serve.page import mount_page
from tests.support.wait import PATIENCE_S

PARAMETERS = (0.2, 0.7, 512, "default")
MARKDOWN = """## Title

- one
- **two**

```python
print('hi')
```

| a | b |
|---|---|
| 1 | 2 |
"""


class ScriptedGateway:
    """An OpenAI-compatible server, moderation included.

    The models `echo` and `other` repeat the question, `endless` never stops, `broken` fails. The
    question "markdown" is answered with `MARKDOWN`; a question with "nasty" is flagged.

    Attributes:
        models: the names that it lists.
        bodies: bodies of the chat completions received, in order.
        moderated: bodies of the moderation requests received, in order.
        abandoned: set when a client closes an endless stream.
    """

    def __init__(self) -> None:
        self.models = ["other", "echo", "endless", "broken"]
        self.bodies: list[dict[str, Any]] = []
        self.moderated: list[dict[str, Any]] = []
        self.abandoned = threading.Event()

    def add_to(self, api: FastAPI) -> None:
        api.add_api_route("/v1/models", self.list_models)
        api.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        api.add_api_route("/v1/moderations", self.moderate, methods=["POST"])

    async def list_models(self) -> dict[str, Any]:
        return {"data": [{"id": name} for name in self.models]}

    async def chat(self, request: Request) -> Any:
        body = await request.json()
        self.bodies.append(body)
        headers = {"x-request-id": request.headers["x-request-id"]}
        if body["model"] == "broken":
            error = {"message": "it broke: ask another model", "code": "engine_error"}
            return JSONResponse({"error": error}, 500, headers=headers)
        stream = self._stream(body)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def moderate(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        self.moderated.append({**body, "key": request.headers.get("authorization")})
        flagged = "nasty" in json.dumps(body["input"])
        return {"results": [{"flagged": flagged, "categories": {"harassment": flagged}}]}

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        parts = [part for message in body["messages"] for part in _parts(message)]
        asked = "".join(part.get("text", "") for part in _parts(body["messages"][-1]))
        num_images = sum(part["type"] == "image_url" for part in parts)
        answer = f"{body['model']} heard: {asked} ({num_images} images)"
        words = (MARKDOWN if "markdown" in asked else answer).split(" ")
        for word in words:
            yield _event([{"delta": {"content": word + " "}, "finish_reason": None}])
        try:
            while body["model"] == "endless":
                yield _event([{"delta": {"content": "on and "}, "finish_reason": None}])
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self.abandoned.set()
            raise
        usage = {"completion_tokens": len(words), "prompt_tokens": 12}
        yield _event([{"delta": {}, "finish_reason": "stop"}], usage=usage)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _event(choices: list[Any], **fields: Any) -> str:
    return f"data: {json.dumps({'choices': choices, **fields})}\n\n"


@contextmanager
def run_page(gateway: ScriptedGateway, **settings: Any) -> Iterator[str]:
    """Run the page and the gateway in this process, one pair at a time; yield their address."""
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        socket.socket() as listener,
    ):
        patch.setenv("GRADIO_TEMP_DIR", folder)
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if moderation := settings.get("moderation"):
            moderation.setdefault("url", f"{address}/v1")
        config = PageConfig(**{"gateway_url": address, **settings})
        api = FastAPI()
        gateway.add_to(api)
        server = uvicorn.Server(
            uvicorn.Config(api, log_level="error", ws="none", timeout_graceful_shutdown=1)
        )

        async def serve() -> None:
            mount_page(api, config)  # here, or Gradio makes event loops and leaves them open
            await server.serve([listener])

        thread = threading.Thread(target=asyncio.run, args=[serve()])
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.02)
            yield address
        finally:
            server.should_exit = True
            thread.join()


class Visitor:
    """A browser's session at the page, without the browser."""

    def __init__(self, address: str, *, query: str = "") -> None:
        self._api = f"{address}/gradio_api"
        self._query = query
        self._session = uuid.uuid4().hex
        config = httpx.get(f"{address}/config", timeout=PATIENCE_S).raise_for_status().json()
        self._events = {event["api_name"]: event["id"] for event in config["dependencies"]}
        self._running = ""

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        files = {"files": (name, data)}
        answer = httpx.post(f"{self._api}/upload", files=files, timeout=PATIENCE_S)
        (path,) = answer.raise_for_status().json()
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def run(self, name: str, *data: Any, event_data: Any = None) -> Iterator[list[Any]]:
        """Trigger an event of the page and yield its outputs as they grow."""
        call = {"data": data, "fn_index": self._events[name], "session_hash": self._session}
        call["event_data"] = event_data
        join = f"{self._api}/queue/join?{self._query}"
        joined = httpx.post(join, json=call, timeout=PATIENCE_S).raise_for_status()
        self._running = joined.json()["event_id"]
        shown: list[Any] = []
        url = f"{self._api}/queue/data?session_hash={self._session}"
        with httpx.stream("GET", url, timeout=PATIENCE_S) as told:
            for line in told.iter_lines():
                event = json.loads(line.removeprefix("data:") or "{}")
                if event.get("msg") == "process_completed" and not event["success"]:
                    raise RuntimeError(event["output"])
                new = event.get("output", {}).get("data")
                if event.get("msg") == "process_generating" and shown:
                    new = [apply_diff(old, diff) for old, diff in zip(shown, new, strict=True)]
                if new:
                    shown = new
                    yield shown

    def stop(self, name: str) -> None:
        call = {"session_hash": self._session, "event_id": self._running}
        call["fn_index"] = self._events[name]
        httpx.post(f"{self._api}/cancel", json=call, timeout=PATIENCE_S).raise_for_status()

    def answer(self, chat: list[Any], *, model: str = "echo") -> list[list[str]]:
        """Return the texts of the chat after each update."""
        views = self.run("answer", chat, [], model, "", False, *PARAMETERS)
        return [texts(view[0]) for view in views]


def said(text: str, *images: dict[str, Any], role: str = "user") -> dict[str, Any]:
    """Return a message of the chat, as the browser has it."""
    files = [{"type": "file", "file": image} for image in images]
    return {"role": role, "content": [*files, {"type": "text", "text": text}]}


def texts(chat: list[dict[str, Any]]) -> list[str]:
    return [part["text"] for message in chat for part in message["content"] if "text" in part]


def red_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(file, "PNG")
    return file.getvalue()
