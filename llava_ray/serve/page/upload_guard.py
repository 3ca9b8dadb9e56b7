"""Limits what a browser may send to Gradio, where Gradio's own checks are not enough.

Gradio fetches URLs in values where a file is expected, builds components that a chat message names,
serves files that handlers return, and has many routes that this page does not need. `UploadGuard`
only admits the page's routes and bounds request sizes; `GuardedBlocks` checks every value before
Gradio does. Files must be uploads.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_UPLOAD_BYTES = 64 << 20
MAX_EVENT_BYTES = 8 << 20
MAX_STORE_BYTES = 4 << 30
MAX_DEPTH = 12

_ROUTES = re.compile(
    r"""/ (?: (?: config | theme\.css | favicon\.ico | manifest\.json | robots\.txt | pwa_icon )? /?
      | (?: assets | static | svelte | pwa_icon ) / .*
      | gradio_api / (?: app_id | info | startup-events | heartbeat/\w+ | upload | upload_progress
          | queue/(?: join | data ) | cancel | reset | theme\.css
          | file=(?! \w+: | [/\\]{2} ) .* )/?
    )""",
    re.VERBOSE,
)


class GuardedBlocks(gr.Blocks):
    """Blocks whose handlers receive no files but uploads."""

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> Any:
        """Check the values that a browser sent, before Gradio processes them.

        Raises:
            gradio.Error: it names a file that was not uploaded, or is not a valid chat.
        """
        check_values(inputs)
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def check_values(value: Any, *, depth: int = 0) -> None:
    """Check a value from a browser recursively.

    Raises:
        gradio.Error: it contains a file that is not an upload, or a component, or is too deep.
    """
    if depth > MAX_DEPTH:
        raise gr.Error("this is nested too deeply to be a chat")
    if isinstance(value, dict):
        if "component" in value or value.get("type") == "component":
            raise gr.Error("a chat message is text or an image; components are not accepted")
        if "path" in value or "url" in value:
            _check_file(value)
        for part in value.values():
            check_values(part, depth=depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            check_values(part, depth=depth + 1)


def _check_file(file: dict[str, Any]) -> None:
    path = file.get("path")
    is_file = file.get("meta") == {"_type": "gradio.FileData"} and not file.get("is_stream")
    if not is_file or not isinstance(path, str) or not is_upload(path):
        raise gr.Error(
            f"the file {str(path)[:80]!r} was not uploaded here or has been deleted: upload it"
        )


def is_upload(path: str) -> bool:
    """Whether this is an existing file in the folder of uploads."""
    try:
        place = Path(path)
        resolved = place.resolve(strict=True)
        is_inside = resolved.is_relative_to(Path(get_upload_folder()).resolve())
    except (OSError, ValueError):
        return False
    return place.is_absolute() and is_inside and resolved.is_file()


class UploadGuard:
    """ASGI middleware around Gradio's application that limits its routes and request sizes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return None
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not _ROUTES.fullmatch(path):
            return await PlainTextResponse("not found", 404)(scope, receive, send)
        is_upload_route = path.rstrip("/").endswith("/upload")
        if is_upload_route and await asyncio.to_thread(measure_store) > MAX_STORE_BYTES:
            refusal = "the page holds too many images at the moment; try again later"
            return await PlainTextResponse(refusal, 507)(scope, receive, send)
        limit = MAX_UPLOAD_BYTES if is_upload_route else MAX_EVENT_BYTES
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            refusal = f"at most {limit:,} bytes per request"
            return await PlainTextResponse(refusal, 413)(scope, receive, send)
        await self._app(scope, _limit(receive, limit), send)
        return None


def measure_store() -> int:
    """Return the total bytes of all stored uploads."""
    num_bytes = 0
    for path in Path(get_upload_folder()).rglob("*"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            num_bytes += path.stat().st_size
    return num_bytes


def _limit(receive: Receive, limit: int) -> Callable[[], Awaitable[Message]]:
    """Wrap `receive` to disconnect when a body without a declared length exceeds the limit."""
    num_bytes = 0

    async def receive_some() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        return {"type": "http.disconnect"} if num_bytes > limit else message

    return receive_some
