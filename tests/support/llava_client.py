"""A client that speaks the protocol of LLaVA's controller and workers byte for byte.

It uses nothing of the package, so that the bytes on the wire are what is compared.
"""

import base64
import http.client
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

PATIENCE_S = 60

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def post(address: str, path: str, body: Any = None, **headers: str) -> Reply:
    """Post a body (bytes as they are, anything else as JSON) and return the whole reply."""
    connection, reply = _send(address, path, body, headers)
    try:
        return Reply(reply.status, dict(reply.getheaders()), reply.read())
    finally:
        connection.close()


def ask(address: str, path: str, body: Any = None) -> Any:
    """Post, and return the JSON of the reply, whose status must be 200."""
    reply = post(address, path, body)
    assert reply.status == 200, reply
    return json.loads(reply.body)


def stream(address: str, body: Any) -> Iterator[bytes]:
    """Yield the objects of an answer as they arrive, each with its final zero byte.

    Closing the iterator closes the connection.
    """
    connection, reply = _send(address, "/worker_generate_stream", body, {})
    rest = b""
    try:
        while piece := reply.read1(8192):
            *objects, rest = (rest + piece).split(b"\0")
            yield from (item + b"\0" for item in objects)
        assert rest == b"", "the answer does not end with a zero byte"
    finally:
        connection.close()


def read(item: bytes) -> tuple[str, int]:
    """Return the text and the error code of an object, which must have exactly these fields."""
    assert item.endswith(b"\0")
    fields = json.loads(item[:-1])
    assert list(fields) == ["text", "error_code"]
    return fields["text"], fields["error_code"]


def generate(address: str, model: str, prompt: str, **fields: Any) -> tuple[str, int]:
    """Return the last object of an answer."""
    return read(list(stream(address, {"model": model, "prompt": prompt, **fields}))[-1])


def render(question: str, *, num_images: int = 0) -> str:
    """Return the prompt of one question, as LLaVA's page renders it for a v1 model."""
    return f"{SYSTEM} USER: {'<image>' * num_images}\n{question} ASSISTANT:"


def make_image(color: str = "red") -> str:
    """Return an image as the page sends it: PNG in base64, without the prefix of a data URL."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _send(
    address: str, path: str, body: Any, headers: dict[str, str]
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=PATIENCE_S)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    fields = {"User-Agent": "LLaVA Client", "Content-Type": "application/json"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", url.path + path, body, {**fields, **named})
    return connection, connection.getresponse()
