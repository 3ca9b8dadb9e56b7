"""Bad requests over HTTP: each gets its status, a code and the remedy, and the replica lives on."""

import gzip
import json
import struct
import zlib
from typing import Any

import httpx
import pytest

from tests.support.image_urls import data_url, png

pytestmark = pytest.mark.ray

CHAT = "/v1/chat/completions"
PATIENCE_S = 60
USER = {"role": "user", "content": "Hello"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [USER], **fields}


def say(content: Any, role: str = "user") -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": content}])


def show(url: Any, **fields: Any) -> dict[str, Any]:
    return say([{"type": "image_url", "image_url": {"url": url, **fields}}])


def bomb(width: int, height: int) -> bytes:
    """Return a small file whose header declares a large image."""
    pieces = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in pieces
    )


INVALID, IMAGE, UNSUPPORTED = "invalid_request", "invalid_image", "unsupported_parameter"
TOO_LONG = "context_length_exceeded"

# name: (body, status, code, words of the message)
BODIES: dict[str, tuple[Any, int, str, str]] = {
    "no body": (b"", 400, INVALID, "send a JSON object"),
    "white space": (b" \n ", 400, INVALID, "send a JSON object"),
    "half of it": (b'{"model": "echo", "mess', 400, INVALID, "not JSON"),
    "a list": (b"[]", 400, INVALID, "send a JSON object"),
    "null": (b"null", 400, INVALID, "send a JSON object"),
    "a text": (b'"Hello"', 400, INVALID, "send a JSON object"),
    "a number": (b"1", 400, INVALID, "send a JSON object"),
    "a form": (b"model=echo&messages=Hello", 400, INVALID, "not JSON"),
    "not UTF-8": (b'{"model": "\xff\xfe"}', 400, INVALID, "not JSON"),
    "compressed": (gzip.compress(json.dumps(chat()).encode()), 400, INVALID, "not JSON"),
    "a deep nest": (b"[" * 100_000, 400, INVALID, "not JSON"),
    "a deep object": (b'{"a":' * 100_000, 400, INVALID, "not JSON"),
    "NaN": (b'{"model": "echo", "temperature": NaN}', 400, INVALID, "not JSON"),
    "a long number": (b'{"seed": ' + b"9" * 10_000 + b"}", 400, INVALID, "not JSON"),
    "nothing in it": ({}, 400, INVALID, "is missing"),
    "no model": ({"messages": [USER]}, 400, INVALID, "/v1/models lists"),
    "model null": (chat(model=None), 400, INVALID, "/v1/models lists"),
    "model a number": (chat(model=5), 400, INVALID, "/v1/models lists"),
    "model unknown": (chat(model="gpt"), 404, "model_not_found", "use one of echo, other"),
    "model a path": (chat(model="../../etc/passwd"), 404, "model_not_found", "use one of echo"),
    "model a book": (chat(model="x" * 501), 400, INVALID, "/v1/models lists"),
    "no messages": ({"model": "echo"}, 400, INVALID, "send a list like"),
    "messages null": (chat(messages=None), 400, INVALID, "send a list like"),
    "messages empty": (chat(messages=[]), 400, INVALID, "send at least one"),
    "messages a text": (chat(messages="Hello"), 400, INVALID, "send a list like"),
    "messages of numbers": (chat(messages=[5]), 400, INVALID, "send an object like"),
    "a message of nothing": (chat(messages=[{}]), 400, INVALID, "use one of"),
    "a role of one's own": (say("Hello", "admin"), 400, INVALID, "use one of"),
    "a role that is a list": (say("Hello", ["user"]), 400, INVALID, "use one of"),
    "no content": (chat(messages=[{"role": "user"}]), 400, INVALID, "add text"),
    "content null": (say(None), 400, INVALID, "add text"),
    "content a number": (say(5), 400, INVALID, "send a string"),
    "content an empty list": (say([]), 400, INVALID, "add text"),
    "content an empty text": (say(""), 400, INVALID, "add text"),
    "content white space": (say(" \n"), 400, INVALID, "add text"),
    "a part that is a number": (say([5]), 400, INVALID, "send a part like"),
    "a part without a type": (say([{"smell": "Hello"}]), 400, INVALID, "use text or image_url"),
    "a part of another type": (say([{"type": "smell"}]), 400, INVALID, "use text or image_url"),
    "audio": (say([{"type": "input_audio"}]), 400, UNSUPPORTED, "text and image_url"),
    "a video": (say([{"type": "video_url"}]), 400, UNSUPPORTED, "text and image_url"),
    "a text of null": (say([{"type": "text", "text": None}]), 400, INVALID, "add text"),
    "a text that is a number": (say([{"type": "text", "text": 5}]), 400, INVALID, "send a string"),
    "half a surrogate pair": (
        b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        INVALID,
        "send valid Unicode",
    ),
    "too many messages": (chat(messages=[USER] * 257), 400, INVALID, "more than the 256"),
    "too long a conversation": (say("word " * 5000), 400, TOO_LONG, "shorten"),
    "an image from the web": (show("http://example.org/a.png"), 400, IMAGE, "data URL"),
    "an image from inside": (show("http://169.254.169.254/"), 400, IMAGE, "data URL"),
    "a file": (show("file:///etc/passwd"), 400, IMAGE, "data URL"),
    "a path": (show("/etc/passwd"), 400, IMAGE, "data URL"),
    "an ftp address": (show("ftp://example.org/a.png"), 400, IMAGE, "data URL"),
    "a script": (show("javascript:alert(1)"), 400, IMAGE, "data URL"),
    "no address": (show(""), 400, IMAGE, "data URL"),
    "an address of null": (show(None), 400, INVALID, "data:image/png"),
    "an address in a list": (show(["a"]), 400, INVALID, "data:image/png"),
    "an image that is a number": (
        say([{"type": "image_url", "image_url": 5}]),
        400,
        INVALID,
        "data:image/png",
    ),
    "an image of nothing": (show("data:image/png;base64,"), 400, IMAGE, "send the bytes"),
    "not base64": (show("data:image/png;base64,@@@@"), 400, IMAGE, "the whole file once"),
    "percent signs instead": (show("data:image/png,%89PNG"), 400, IMAGE, "the file in base64"),
    "a page for an image": (show(data_url(b"<p>", "text/html")), 400, IMAGE, "PNG, JPEG"),
    "words for an image": (show(data_url(b"Hello there")), 400, IMAGE, "not an image"),
    "a PDF": (show(data_url(b"%PDF-1.7")), 400, IMAGE, "convert it to PNG"),
    "an SVG": (show(data_url(b"<svg xmlns=''/>")), 400, IMAGE, "convert it to PNG"),
    "half an image": (show(data_url(png(64, 64)[:2000])), 400, IMAGE, "send the whole file"),
    "a bomb": (show(data_url(bomb(50_000, 50_000))), 400, IMAGE, "scale it down"),
    "a small bomb": (show(data_url(bomb(6400, 6400))), 400, IMAGE, "scale it down"),
    "a thread": (show(data_url(png(2000, 2))), 400, IMAGE, "crop it"),
    "a heavy image": (
        show(data_url(bytes((16 << 20) + 1))),
        400,
        IMAGE,
        "more than the 16,777,216",
    ),
    "too many images": (
        say([{"type": "image_url", "image_url": data_url(png())}] * 17),
        400,
        INVALID,
        "the 16",
    ),
    "a detail of one's own": (show(data_url(png()), detail="sharp"), 400, INVALID, "use auto"),
    "temperature too high": (chat(temperature=2.1), 400, INVALID, "from 0 to 2"),
    "temperature below zero": (chat(temperature=-0.1), 400, INVALID, "from 0 to 2"),
    "temperature a word": (chat(temperature="hot"), 400, INVALID, "from 0 to 2"),
    "temperature true": (chat(temperature=True), 400, INVALID, "from 0 to 2"),
    "top_p below zero": (chat(top_p=-0.5), 400, INVALID, "from 0 to 1"),
    "top_p over one": (chat(top_p=1.5), 400, INVALID, "from 0 to 1"),
    "no tokens": (chat(max_tokens=0), 400, INVALID, "at least 1"),
    "fewer than no tokens": (chat(max_tokens=-5), 400, INVALID, "at least 1"),
    "half a token": (chat(max_tokens=1.5), 400, INVALID, "at least 1"),
    "two limits": (chat(max_tokens=1, max_completion_tokens=2), 400, INVALID, "send one of them"),
    "too many stop texts": (chat(stop=["a"] * 17), 400, INVALID, "at most 16"),
    "a stop number": (chat(stop=5), 400, INVALID, "a list of at most 16"),
    "a seed too large": (chat(seed=2**64), 400, INVALID, "64 bits"),
    "stream a word": (chat(stream="yes"), 400, INVALID, "true or false"),
    "stream options alone": (
        chat(stream_options={"include_usage": True}),
        400,
        INVALID,
        "set stream to true",
    ),
    "tools": (chat(tools=[{"type": "function"}]), 400, UNSUPPORTED, "describe the task"),
    "sound as an answer": (chat(modalities=["audio"]), 400, UNSUPPORTED, "text"),
    "no answers": (chat(n=0), 400, INVALID, "n"),
    "too many answers": (chat(n=100_000), 400, INVALID, "n"),
    "a bias that is a list": (chat(logit_bias=[1]), 400, INVALID, "logit_bias"),
    "a format of nonsense": (chat(response_format={"type": "poem"}), 400, "", "response_format"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_gets_its_status_and_the_remedy(served: str, name: str) -> None:
    body, status, code, words = BODIES[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(served + CHAT, content=content, timeout=PATIENCE_S)
    check(reply, status, code, words)


REQUESTS: dict[str, tuple[str, str, dict[str, Any], int, str, str]] = {
    "GET": ("GET", CHAT, {}, 405, "method_not_allowed", "use POST"),
    "PUT": ("PUT", CHAT, {"json": chat()}, 405, "method_not_allowed", "use POST"),
    "DELETE": ("DELETE", "/v1/models/echo", {}, 405, "method_not_allowed", "use GET"),
    "POST of models": ("POST", "/v1/models", {}, 405, "method_not_allowed", "use GET"),
    "no such route": ("POST", "/v1/nothing", {}, 404, "not_found", "this API has"),
    "no such model": ("GET", "/v1/models/gpt", {}, 404, "model_not_found", "use one of echo"),
    "a way out": ("GET", "/v1/models/..%2f..%2fetc", {}, 404, "model_not_found", "use one of echo"),
    "no /v1": ("POST", "/chat/completions", {"json": chat()}, 404, "not_found", "the base URL"),
    "a compression of its own": (
        "POST",
        CHAT,
        {"content": b"x", "headers": {"Content-Encoding": "br"}},
        415,
        "unsupported_encoding",
        "send it as gzip",
    ),
    "a timeout of words": (
        "POST",
        CHAT,
        {"json": chat(), "headers": {"X-Request-Timeout": "soon"}},
        400,
        INVALID,
        "send a number of seconds",
    ),
    "a body too large": (
        "POST",
        CHAT,
        {"content": bytes((32 << 20) + 1)},
        413,
        "request_too_large",
        "send fewer",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_gets_its_status_and_the_remedy(served: str, name: str) -> None:
    method, path, options, status, code, words = REQUESTS[name]
    check(httpx.request(method, served + path, timeout=PATIENCE_S, **options), status, code, words)


def check(reply: httpx.Response, status: int, code: str, words: str) -> None:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code or error["code"])
    assert words in error["message"]
    assert 10 < len(error["message"]) < 700
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert reply.headers["x-should-retry"] == "false"
    assert reply.headers["x-request-id"]
    assert "Traceback" not in reply.text


def test_after_all_of_them_the_same_replica_answers(served: str) -> None:
    assert len(BODIES) + len(REQUESTS) > 60
    before = find_pids("echo")
    for body, *_ in BODIES.values():
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        assert httpx.post(served + CHAT, content=content, timeout=PATIENCE_S).status_code < 500
    reply = httpx.post(served + CHAT, json=say("Still here?"), timeout=PATIENCE_S)
    assert reply.json()["choices"][0]["message"]["content"] == "Still here? (0 images)"
    assert find_pids("echo") == before
    assert len(before) == 1


def find_pids(model: str) -> list[int]:
    """Return the process ids of a model's replicas, from Serve's controller."""
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    replicas = details["applications"]["app"]["deployments"][model]["replicas"]
    return [replica["pid"] for replica in replicas]
