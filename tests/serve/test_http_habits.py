"""HTTP as clients speak it: HEAD, slashes, a URL without /v1, compressed bodies, preflights."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.support.local_gateway import KEYS, PATH, Nearby, auth, body, run_nearby

LOCKED = {"api_keys": ",".join(f"{name}={key}" for name, key in KEYS.items())}
READ = (
    "/v1/models",
    "/v1/models/talker",
    "/v1/usage",
    "/usage",
    "/healthz",
    "/openapi.json",
)


def play(scene: Callable[[Nearby], Awaitable[None]], **config: Any) -> None:
    async def go() -> None:
        async with run_nearby(**config) as there:
            await scene(there)

    asyncio.run(go())


def test_head_answers_as_get_does_without_a_body() -> None:
    async def scene(there: Nearby) -> None:
        for path in READ:
            whole = await there.get(path, "carol")
            head = await there.request("HEAD", path, headers=auth("carol"))
            assert (head.status_code, head.content) == (whole.status_code, b"") == (200, b"")
            assert head.headers["content-type"] == whole.headers["content-type"]
        assert (await there.request("HEAD", "/v1/models")).status_code == 401
        wrong = await there.request("HEAD", PATH, headers=auth("carol"))
        assert wrong.status_code == 405

    play(scene, **LOCKED)


def test_slashes_too_many_mean_nothing() -> None:
    async def scene(there: Nearby) -> None:
        for path in READ:
            for spelt in (f"{path}/", path.replace("/v1/", "/v1//") + "//"):
                reply = await there.get(spelt)
                assert reply.status_code == 200, spelt
        for spelt in (f"{PATH}/", PATH.replace("/chat", "//chat")):
            reply = await there.request("POST", spelt, json=body("Hello"))
            assert reply.status_code == 200, spelt
        for path in ("/v1", "/v1/"):
            reply = await there.get(path)
            assert reply.status_code == 404
            assert "GET /v1/models" in reply.json()["error"]["message"]

    play(scene)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/chat/completions"),
        ("POST", "/chat/completions/"),
        ("POST", "/completions"),
        ("GET", "/models"),
        ("GET", "/models/talker"),
        ("POST", "/embeddings"),
        ("POST", "/responses"),
    ],
)
def test_a_base_url_without_v1_is_told_the_right_one(method: str, path: str) -> None:
    async def scene(there: Nearby) -> None:
        reply = await there.request(method, path)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (404, "not_found")
        assert error["message"].endswith(f"set the base URL of the client to {there.url}/v1")
        assert reply.headers["x-should-retry"] == "false"
        behind = {"X-Forwarded-Host": "llava.example.org", "X-Forwarded-Proto": "https"}
        reply = await there.request(method, path, headers=behind)
        assert "to https://llava.example.org/v1" in reply.json()["error"]["message"]

    play(scene)


def test_an_unknown_path_is_a_404_in_json_that_lists_what_there_is() -> None:
    async def scene(there: Nearby) -> None:
        for method, path in (("GET", "/nothing"), ("POST", "/v1/v1/chat/completions")):
            reply = await there.request(method, path)
            assert reply.status_code == 404
            assert f"there is no {method} {path}" in reply.json()["error"]["message"]
        assert "use POST" in (await there.get(PATH)).json()["error"]["message"]
        reply = await there.request("DELETE", "/v1/models")
        assert reply.json()["error"]["message"].endswith("use GET")

    play(scene)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "deflate"])
def test_a_compressed_body_is_read(encoding: str) -> None:
    async def scene(there: Nearby) -> None:
        plain = json.dumps(body("Hello there " * 5000)).encode()
        packed = zlib.compress(plain) if encoding == "deflate" else gzip.compress(plain)
        headers = {"Content-Encoding": encoding}
        assert (await post(there, packed, headers)).status_code == 200
        assert there.talker.order[-1].startswith("Hello there Hello")
        for damaged in (packed[:-30], b"no" + packed, packed[:40] + b"?" * 40):
            reply = await post(there, damaged, headers)
            assert reply.status_code == 400
            assert "the compressed body is" in reply.json()["error"]["message"]
        assert (await post(there, plain, {"Content-Encoding": "identity"})).status_code == 200

    play(scene)


def test_a_body_that_unpacks_to_too_much_is_refused_and_an_unknown_compression_too() -> None:
    async def scene(there: Nearby) -> None:
        bomb = gzip.compress(bytes(20_000_000))
        assert len(bomb) < 100_000
        reply = await post(there, bomb, {"Content-Encoding": "gzip"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        for encoding in ("br", "zstd", "gzip, br"):
            reply = await post(there, bomb, {"Content-Encoding": encoding})
            assert (reply.status_code, reply.json()["error"]["code"]) == (
                415,
                "unsupported_encoding",
            )
            assert "send it as gzip, or uncompressed" in reply.json()["error"]["message"]

    play(scene, limits={"max_body_bytes": 100_000})


def test_a_preflight_of_a_private_network_is_answered() -> None:
    async def scene(there: Nearby) -> None:
        asked = {
            "Origin": "https://example.org",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, x-stainless-os",
            "Access-Control-Request-Private-Network": "true",
        }
        reply = await there.request("OPTIONS", PATH, headers=asked)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-private-network"] == "true"
        assert reply.headers["access-control-allow-origin"] == "https://example.org"
        stranger = await there.request(
            "OPTIONS", PATH, headers={**asked, "Origin": "https://example.com"}
        )
        assert stranger.status_code == 400

    play(scene, cors_origins=["https://example.org"], **LOCKED)


async def post(there: Nearby, content: bytes, headers: dict[str, str]) -> httpx.Response:
    return await there.request("POST", PATH, content=content, headers=headers)
