"""The rest of the OpenAI API over HTTP, through the unmodified `openai` client."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.ray

PATIENCE_S = 60


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}


def post(served: str, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(served + path, json=fields, timeout=PATIENCE_S)


def test_several_answers_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**say("Hello there"), n=3, max_tokens=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.content for choice in whole.choices} == {"Hello there"}
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    options: Any = {"stream_options": {"include_usage": True}}
    stream = client.chat.completions.create(
        **say("Hello there"), n=3, max_tokens=2, stream=True, **options
    )
    texts, usage = {}, None
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == dict.fromkeys(range(3), "Hello there")
    assert usage == whole.usage


def test_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    asked = say("one two", logprobs=True, top_logprobs=2)
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(token.token for token in tokens) == choice.message.content
    assert tokens[0].top_logprobs[0].bytes == list(b"one")
    streamed = []
    for event in client.chat.completions.create(**asked, stream=True):
        if (told := event.choices[0].logprobs) is not None:
            streamed += told.content or []
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_every_sampling_field_is_taken(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **say("Hello"),
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        logit_bias={"7": 1},
        seed=3,
        stop=["zzz"],
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 1,
            "stop_token_ids": [3],
        },
    )
    assert answer.choices[0].message.content == "Hello (0 images)"


def test_a_format_that_the_engine_cannot_hold_to_is_refused_by_name(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError, match="echo engine") as caught:
        client.chat.completions.create(**say("Hello"), response_format={"type": "json_object"})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "response_format")


def test_plain_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="echo", prompt=["a b", "c"], n=2, logprobs=1, seed=1)
    assert whole.id.startswith("cmpl-")
    texts = [choice.text for choice in whole.choices]
    assert texts == ["a b (0 images)"] * 2 + ["c (0 images)"] * 2
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.text_offset == [0, 1, 3, 6]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 14)
    stream = client.completions.create(model="echo", prompt="a b", stream=True, echo=True)
    assert "".join(event.choices[0].text for event in stream) == "a ba b (0 images)"
    with pytest.raises(openai.BadRequestError, match="names 1 images") as caught:
        client.completions.create(model="echo", prompt="<image>")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokens_there_and_back(served: str, prefix: str) -> None:
    told = post(served, f"{prefix}/tokenize", model="echo", prompt="Hi!", return_token_strs=True)
    assert told.json() == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [72, 105, 33],
        "token_strs": ["H", "i", "!"],
    }
    back = post(served, f"{prefix}/detokenize", model="echo", tokens=told.json()["tokens"])
    assert back.json() == {"prompt": "Hi!"}
    asked = say("Hi!")
    told = post(served, f"{prefix}/tokenize", **asked)
    assert told.json()["count"] > 3
    assert told.json()["token_strs"] is None
    nobody = post(served, f"{prefix}/tokenize", prompt="Hi!")
    assert nobody.status_code == 400
    assert nobody.json()["error"]["param"] == "model"
    bad = post(served, f"{prefix}/detokenize", model="echo", tokens=[2**31 - 1])
    assert bad.json()["error"]["param"] == "tokens"
    wrong = httpx.get(f"{served}{prefix}/tokenize", timeout=PATIENCE_S)
    assert wrong.status_code == 405
    assert "use POST" in wrong.json()["error"]["message"]


def test_habits_of_clients_are_met_behind_serves_proxy(served: str, client: openai.OpenAI) -> None:
    asked = say("Hello", max_tokens=10**7, reasoning_effort="low", length_penalty=1.0, foo=[1])
    asked["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
        {"role": "system", "content": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ]
    packed = gzip.compress(json.dumps(asked).encode())
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    reply = httpx.post(
        f"{served}/v1/chat/completions/", content=packed, headers=headers, timeout=PATIENCE_S
    )
    assert reply.json()["choices"][0]["message"]["content"] == "Be brief. (0 images)"
    assert reply.headers["x-llava-ray-ignored"] == "reasoning_effort, foo"
    paths = ("/v1/models", "/v1/models/echo", "/usage", "/openapi.json")
    for path in (*paths, "/healthz", "/readyz", "/health"):
        head = httpx.head(served + path, timeout=PATIENCE_S)
        assert (head.status_code, head.content) == (200, b"")
        assert httpx.get(f"{served}{path}/", timeout=PATIENCE_S).status_code == 200
    with (
        openai.OpenAI(base_url=served, api_key="none", max_retries=0) as misled,
        pytest.raises(openai.NotFoundError, match=f"set the base URL of the client to {served}/v1"),
    ):
        misled.chat.completions.create(**say("Hello"))
    usage: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.chat.completions.create(**say("a b"), stream=True, stream_options=usage)
    counts = [event.usage.completion_tokens for event in stream if event.usage]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2


def test_models_tell_their_context(client: openai.OpenAI) -> None:
    assert client.models.retrieve("echo").model_dump()["max_model_len"] == 4096
    assert [model.model_dump()["max_model_len"] for model in client.models.list()] == [4096, 4096]
