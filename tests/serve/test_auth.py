"""Authentication and limits: keys, budgets, fairness, deadlines, retries; through a gateway."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from llava_ray.cli import app as cli
from llava_ray.client import Client
from llava_ray.config import KeyConfig, LimitsConfig, ServeConfig, hash_key
from llava_ray.errors import AuthError, RateLimitError
from llava_ray.serve.backends.admission_queue import AdmissionQueue
from llava_ray.serve.gateway import openai_routes
from llava_ray.serve.gateway.rate_limit import Account
from llava_ray.serve.usage import Usage
from tests.support.local_gateway import KEYS, PATH, Nearby, body, run_nearby

LOCKED = {"api_keys": ",".join(f"{name}={key}" for name, key in KEYS.items())}


def keys(**limits: Any) -> dict[str, Any]:
    """Return settings with keys: alice's has these limits, carol's is an admin key."""
    made = [
        KeyConfig(name=name, sha256=hash_key(key), is_admin=name == "carol")
        for name, key in KEYS.items()
    ]
    return {"api_keys": [made[0].model_copy(update=limits), *made[1:]]}


def play(scene: Callable[[Nearby], Awaitable[None]], **config: Any) -> None:
    async def go() -> None:
        async with run_nearby(**config) as there:
            await scene(there)

    asyncio.run(go())


def error_of(reply: httpx.Response) -> tuple[int, str]:
    error = reply.json()["error"]
    assert error["message"]
    return reply.status_code, error["code"]


def test_without_keys_the_door_is_open() -> None:
    async def scene(there: Nearby) -> None:
        assert (await there.say("Hello")).status_code == 200
        assert (await there.say("Hello", "whatever")).status_code == 200
        (usage,) = (await there.get("/v1/usage")).json()["data"]
        assert (usage["key"], usage["requests"], usage["completion_tokens"]) == ("anybody", 2, 6)

    play(scene)


def test_with_keys_only_those_who_have_one_come_in() -> None:
    async def scene(there: Nearby) -> None:
        paths = ("/v1/models", "/v1/models/talker", "/v1/usage", "/v1/nothing")
        for name, words in (
            ("", "requires an API key"),
            ("lr-mallory-0123456789", "unknown API key"),
        ):
            for reply in [
                *[await there.get(path, name) for path in paths],
                await there.say("", name),
            ]:
                assert error_of(reply) == (401, "invalid_api_key")
                assert words in reply.json()["error"]["message"]
                assert reply.json()["error"]["type"] == "authentication_error"
                assert reply.headers["www-authenticate"] == "Bearer"
                assert "mallory" not in reply.text
        basic = await there.get("/v1/models", Authorization=f"Basic {KEYS['bob']}")
        assert error_of(basic) == (401, "invalid_api_key")
        for name in KEYS:
            assert (await there.get("/v1/models", name)).status_code == 200
            assert (await there.say("Hello", name)).status_code == 200
        assert (await there.get("/healthz")).status_code == 200
        assert there.talker.num_started == 3

    play(scene, **LOCKED)


def test_our_own_client_sends_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(there: Nearby) -> None:
        async with Client(there.url, api_key=KEYS["bob"]) as client:
            assert await client.list_models() == ["talker"]
        monkeypatch.setenv("LLAVA_RAY_API_KEY", KEYS["alice"])
        async with Client(there.url) as client:
            assert await client.list_models() == ["talker"]
        async with Client(there.url, api_key="") as client:
            with pytest.raises(AuthError, match="requires an API key"):
                await client.list_models()

    play(scene, **LOCKED)


def test_the_log_names_the_key_and_has_neither_keys_nor_bodies() -> None:
    async def scene(there: Nearby) -> None:
        await there.say("a private matter", "alice")
        await there.say("a private matter", "lr-mallory-0123456789")
        await there.request("POST", f"{PATH}?key=hidden", content=b"{private", headers={})
        text = "\n".join(there.log)
        assert "200 POST /v1/chat/completions, key alice, talker, 7+3 tokens" in text
        assert "401 POST /v1/chat/completions, invalid_api_key" in text
        assert not any(word in text for word in ("private", "mallory", "hidden", KEYS["alice"]))

    play(scene, **LOCKED)


def test_keys_come_from_the_environment_and_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = CliRunner().invoke(cli, ["keys", "new", "dave"])
    assert made.exit_code == 0
    key = made.stderr.splitlines()[-1]
    assert key.startswith("lr-")
    assert len(key) > 40
    assert key not in made.stdout
    file = tmp_path / "keys.yaml"
    file.write_text(made.stdout + '- {"name": "erin", "sha256": "' + "0" * 64 + '"}\n')
    monkeypatch.setenv("LLAVA_RAY_API_KEYS", f"{KEYS['bob']}, alice={KEYS['alice']}\n")
    monkeypatch.setenv("LLAVA_RAY_API_KEYS_FILE", str(file))
    monkeypatch.setenv("LLAVA_RAY_API_KEY", "of the client, and none of the server's matters")
    config = ServeConfig()
    names = [entry.name for entry in config.api_keys]
    assert names == [f"key-{hash_key(KEYS['bob'])[:6]}", "alice", "dave", "erin"]
    assert config.api_keys[2].sha256 == hash_key(key)
    assert not any(secret in repr(config) for secret in (key, *KEYS.values()))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"api_keys": "weak-secret"}, "at least 20 random"),
        ({"api_keys": "me=weak-secret"}, "at least 20 random"),
        ({"api_keys": f"me={KEYS['bob']},me={KEYS['alice']}"}, "two API keys are named"),
        ({"api_keys": f"my name={KEYS['bob']}"}, "at least 20 random"),
        ({"api_keys_file": "/nowhere/keys.yaml"}, "cannot read api_keys_file"),
        ({"api_keys": [{"name": "me", "sha256": "abc"}]}, "sha256"),
        ({"api_keys": [{"name": "me", "sha": "0" * 64}]}, "did you mean sha256"),
        ({"page_key": {"a": "weak-secret"}}, "page_key"),
    ],
)
def test_wrong_keys_are_refused_and_not_shown(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        ServeConfig(**given)
    assert "weak-secret" not in str(caught.value)
    assert KEYS["bob"] not in str(caught.value)


def test_a_file_that_is_no_list_of_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("alice: secret")
    with pytest.raises(ValidationError, match="is not a list of keys"):
        ServeConfig(api_keys_file=str(tmp_path / "keys.yaml"))


def test_a_bad_name_for_a_new_key_is_refused() -> None:
    made = CliRunner().invoke(cli, ["keys", "new", "a b"])
    assert "up to 64 letters" in str(made.exception)


def test_requests_a_minute_are_counted_for_each_key() -> None:
    async def scene(there: Nearby) -> None:
        replies = [await there.say("Hello", "alice") for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 429]
        assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == [
            "1",
            "0",
            "0",
        ]
        assert error_of(replies[-1]) == (429, "rate_limit_exceeded")
        assert "used up its 2 requests per minute" in replies[-1].json()["error"]["message"]
        assert 0 < int(replies[-1].headers["retry-after"]) <= 30
        assert replies[-1].headers["x-ratelimit-limit-requests"] == "2"
        assert (await there.get("/v1/models", "alice")).status_code == 200  # costs nothing
        assert (await there.say("Hello", "bob")).status_code == 200
        assert "x-ratelimit-limit-requests" not in (await there.say("Hello", "bob")).headers

    play(scene, **keys(requests_per_min=2))


def test_tokens_are_counted_when_an_answer_ends_also_when_it_is_broken_off() -> None:
    async def scene(there: Nearby) -> None:
        async with there.stream("linger", "alice"):
            pass
        await there.until(lambda: there.talker.num_running == 0 and len(there.log) == 1)
        reply = await there.say("Hello", "alice")  # 7 + 1 tokens are gone
        assert reply.headers["x-ratelimit-remaining-tokens"] == "2"
        refused = await there.say("Hello", "alice")  # 7 + 3 more: overdrawn
        assert error_of(refused) == (429, "rate_limit_exceeded")
        assert "10 tokens per day" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 3600
        assert refused.headers["x-should-retry"] == "false"

    play(scene, **keys(tokens_per_day=10))


def test_budgets_are_filled_again_evenly() -> None:
    now = [0.0]
    account = Account(
        KeyConfig(name="me", sha256="0" * 64, requests_per_min=6, tokens_per_min=60),
        clock=lambda: now[0],
    )
    for _ in range(6):
        account.begin()
    with pytest.raises(RateLimitError) as caught:
        account.begin()
    assert caught.value.retry_after_s == pytest.approx(10)
    now[0] += 10
    account.begin()
    account.end(Usage(num_prompt_tokens=50, num_tokens=100), is_error=False)  # 90 below zero
    now[0] += 60
    with pytest.raises(RateLimitError, match="60 tokens per minute: try again in 31 s"):
        account.begin()
    now[0] += 31
    account.begin()
    now[0] += 10**6
    assert account.describe_limits()["x-ratelimit-remaining-tokens"] == "60"
    assert account.describe()["total_tokens"] == 150
    assert account.describe()["refused"] == 2


def test_a_key_has_so_many_requests_at_once() -> None:
    async def scene(there: Nearby) -> None:
        async with there.stream("linger", "alice"):
            refused = await there.say("Hello", "alice")
            assert error_of(refused) == (429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await there.say("Hello", "bob")).status_code == 200
        await there.until(lambda: len(there.log) == 3)
        assert (await there.say("Hello", "alice")).status_code == 200

    play(scene, **keys(max_in_flight=1))


def test_a_full_gateway_says_so_at_once() -> None:
    async def scene(there: Nearby) -> None:
        async with there.stream("linger"):
            refused = await there.say("Hello")
            assert error_of(refused) == (503, "overloaded")
            assert "1 requests in flight, its maximum" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"] == "1"
            assert (await there.get("/healthz")).status_code == 200
            assert (await there.get("/v1/models")).status_code == 200

    play(scene, limits=LimitsConfig(max_in_flight=1))


def test_the_queue_before_a_model_is_bounded_and_fair_between_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queues: list[AdmissionQueue] = []

    def build_queue(*args: Any, **options: Any) -> AdmissionQueue:
        queues.append(AdmissionQueue(*args, **options))
        return queues[0]

    monkeypatch.setattr(openai_routes, "AdmissionQueue", build_queue)

    async def scene(there: Nearby) -> None:
        log, talker = there.log, there.talker
        async with there.stream("linger", "alice"):
            tasks = {}
            for number, name in enumerate(["alice", "alice", "alice", "bob"], 1):
                words = f"{name} {number}"
                tasks[words] = asyncio.create_task(there.say(words, name))
                await there.until(lambda: queues[0].num_waiting == min(number, 3))  # noqa: B023
            # three may wait: bob took the place of the last of alice, who had them all
            assert error_of(await tasks.pop("alice 3")) == (503, "overloaded")
            refused = await there.say("alice 5", "alice")
            assert error_of(refused) == (503, "overloaded")
            assert "3 requests are waiting already" in refused.json()["error"]["message"]
            assert len(log) == 2
        for task in tasks.values():
            assert (await task).status_code == 200
        assert talker.order == ["linger", "alice 1", "bob 4", "alice 2"]
        assert talker.most_running == 1

    play(scene, **keys(), model={"max_ongoing_requests": 1, "max_queued_requests": 3})


def test_waiting_has_an_end() -> None:
    async def scene(there: Nearby) -> None:
        async with there.stream("linger"):
            refused = await there.say("Hello")
            assert error_of(refused) == (503, "overloaded")
            assert "had no free slot for 1 s" in refused.json()["error"]["message"]
        await there.until(lambda: there.talker.num_running == 0)
        assert (await there.say("Hello")).status_code == 200

    play(scene, limits=LimitsConfig(max_wait_s=1), model={"max_ongoing_requests": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_stopped(stream: bool) -> None:
    async def scene(there: Nearby) -> None:
        late = await there.say("wait", headers={"X-Request-Timeout": "0.1"}, stream=stream)
        assert error_of(late) == (504, "deadline_exceeded")
        assert "longer than the 0.1 s" in late.json()["error"]["message"]
        await there.until(lambda: there.talker.num_running == 0)
        late = await there.say("linger", headers={"X-Request-Timeout": "2"})
        assert error_of(late) == (504, "deadline_exceeded")
        async with there.stream("linger", headers={"X-Request-Timeout": "2"}) as events:
            assert (await anext(events))["error"]["code"] == "deadline_exceeded"
            assert [event async for event in events] == []
        await there.until(lambda: there.talker.num_running == 0)
        usage = (await there.get("/v1/usage")).json()["data"][0]
        assert (usage["errors"], usage["in_flight"]) == (3, 0)
        assert usage["completion_tokens"] == 2  # one word each of those that lingered

    play(scene)


def test_the_deadline_is_that_of_the_configuration_at_most() -> None:
    async def scene(there: Nearby) -> None:
        for headers in ({}, {"X-Request-Timeout": "100"}):
            assert error_of(await there.say("wait", headers=headers)) == (504, "deadline_exceeded")
        for text in ("soon", "0", "-1", "nan", ""):
            bad = await there.say("Hello", headers={"X-Request-Timeout": text})
            assert error_of(bad) == (400, "invalid_request")
            assert bad.json()["error"]["param"] == "X-Request-Timeout"

    play(scene, limits=LimitsConfig(request_timeout_s=0.1))


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def scene(there: Nearby) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(there.url.split(":")[-1]))
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{".encode())
        assert b"504" in await reader.readline()
        writer.close()

    play(scene, limits=LimitsConfig(request_timeout_s=0.1))


def test_a_retry_takes_the_place_of_the_first_try() -> None:
    async def scene(there: Nearby) -> None:
        again = {"Idempotency-Key": "one"}
        first = asyncio.create_task(there.say("wait", "alice", again))
        await there.until(lambda: there.talker.num_running == 1)
        async with there.stream("linger", "alice", again) as events:
            assert error_of(await first) == (409, "superseded")
            async with there.stream("linger too", "bob", again):  # another key's is another
                assert there.talker.num_running == 2
            last = asyncio.create_task(there.say("Hello", "alice", again))
            assert (await anext(events))["error"]["code"] == "superseded"
            assert (await last).status_code == 200
        assert (await there.say("Hello", "alice", again)).status_code == 200
        assert there.talker.num_started == 5

    play(scene, **keys(max_in_flight=1))


def test_usage_is_ones_own_and_an_admins_is_everybodys() -> None:
    async def scene(there: Nearby) -> None:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        await there.say([image, {"type": "text", "text": "Look"}], "alice")
        await there.say("", "alice")
        await there.say("Hello", "bob")
        own = (await there.get("/v1/usage", "alice")).json()
        assert own["since"] > 1e9
        assert own["data"] == [
            {
                "key": "alice",
                "requests": 2,
                "errors": 1,
                "refused": 0,
                "in_flight": 0,
                "prompt_tokens": 7,
                "completion_tokens": 3,
                "total_tokens": 10,
                "image_tokens": 1,
            }
        ]
        everybody = (await there.get("/v1/usage", "carol")).json()["data"]
        assert [(one["key"], one["requests"]) for one in everybody] == [
            ("alice", 2),
            ("bob", 1),
            ("carol", 0),
        ]

    play(scene, **keys())


def test_no_site_may_call_the_api_unless_it_is_listed() -> None:
    asked = {
        "Origin": "https://good.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }

    async def closed(there: Nearby) -> None:
        reply = await there.request("OPTIONS", PATH, headers=asked)
        assert reply.status_code == 401
        assert not any(name.startswith("access-control") for name in reply.headers)

    async def listed(there: Nearby) -> None:
        reply = await there.request("OPTIONS", PATH, headers=asked)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://good.example"
        other = {**asked, "Origin": "https://evil.example"}
        reply = await there.request("OPTIONS", PATH, headers=other)
        assert "access-control-allow-origin" not in reply.headers
        reply = await there.say("Hello", "mallory", {"Origin": "https://good.example"})
        assert error_of(reply) == (401, "invalid_api_key")  # and the site can read why
        assert reply.headers["access-control-allow-origin"] == "https://good.example"

    play(closed, **LOCKED)
    play(listed, **LOCKED, cors_origins=["https://good.example"])


def test_the_length_of_answers_can_be_limited() -> None:
    async def scene(there: Nearby) -> None:
        refused = await there.say("Hello", max_tokens=101)
        assert error_of(refused) == (400, "invalid_request")
        assert "more than the 100 allowed" in refused.json()["error"]["message"]
        for fields, expected in (({}, 100), ({"max_tokens": 5}, 5)):
            assert (await there.say("Hello", **fields)).status_code == 200
            assert there.talker.last_request is not None
            assert there.talker.last_request.sampling.max_tokens == expected

    play(scene, limits=LimitsConfig(max_tokens=100, excess_max_tokens="refuse"))


def test_bodies_that_are_no_requests_are_counted_as_errors() -> None:
    async def scene(there: Nearby) -> None:
        assert (await there.request("POST", PATH, content=b"{")).status_code == 400
        assert (await there.request("POST", PATH, json=body("Hi", model="x"))).status_code == 404
        assert (await there.get("/v1/usage")).json()["data"][0]["errors"] == 2

    play(scene)
