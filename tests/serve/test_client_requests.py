"""What real clients send: a corpus of requests, each with its status and what is in the prompt."""

import asyncio
import itertools
import json
from collections.abc import Mapping
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from llava_ray.errors import RequestError, UnsupportedError
from llava_ray.serve.openai.chat import parse_chat
from llava_ray.serve.openai.completions import parse_completion
from llava_ray.serve.openai.fields import (
    CHAT_RULES,
    COMPLETION_RULES,
    IGNORED_HEADER,
    Rule,
    write_ignored,
)
from llava_ray.serve.openai.protocol import ChatBody, CompletionBody, SamplingBody
from llava_ray.serve.openai.turns import arrange_turns, is_blank
from llava_ray.template import OwnTemplate, find_template
from llava_ray.template.check import find_problem
from llava_ray.template.tokens import count_images, join_text
from llava_ray.types import ChatRequest, ImagePart, Message, TextPart
from tests.support.client_requests import REQUESTS, ClientRequest
from tests.support.local_gateway import PATH, run_nearby
from tests.support.openai_bodies import HELLO, LIMITS

LOOSE = LIMITS.model_copy(update={"max_messages": 100})
NAMES = [f"{request.client}: {request.what}" for request in REQUESTS]


def test_the_corpus_is_large_and_names_each_request_once() -> None:
    assert len(REQUESTS) >= 150
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("request_", REQUESTS, ids=NAMES)
def test_what_a_client_sends_becomes_the_prompt_or_a_clear_400(request_: ClientRequest) -> None:
    if not request_.prompt:
        with pytest.raises(RequestError) as caught:
            parse_chat(request_.body, limits=LOOSE, request_id="x")
        assert (caught.value.status, caught.value.param) == (400, request_.param)
        assert len(caught.value.message) < 300
        return
    call = parse_chat(request_.body, limits=LOOSE, request_id="x")
    assert isinstance(call.request, ChatRequest)
    assert OwnTemplate().render(call.request.messages) == request_.prompt
    assert call.ignored == request_.ignored
    for name, value in request_.sampling.items():
        assert getattr(call.request.sampling, name) == value
    for name in ("vicuna_v1", "mistral_instruct", "qwen", "v0"):  # LLaVA's own take it too
        find_template(name).render(call.request.messages)


def test_over_http_each_gets_its_status_and_the_header_of_what_was_ignored() -> None:
    async def ask() -> None:
        async with run_nearby() as there:
            for request in REQUESTS:
                reply = await there.request("POST", PATH, json=request.body)
                assert reply.status_code == (200 if request.prompt else 400), request
                if not request.prompt:
                    assert reply.json()["error"]["param"] == request.param
                    continue
                assert reply.headers.get(IGNORED_HEADER, "") == ", ".join(request.ignored)
                if request.body.get("stream"):
                    assert reply.text.endswith("data: [DONE]\n\n")
                else:
                    assert reply.json()["choices"][0]["message"]["content"] == "1 2 3 "

    asyncio.run(ask())


TABLES: list[tuple[type[SamplingBody], Mapping[str, Rule], Any, dict[str, Any]]] = [
    (ChatBody, CHAT_RULES, parse_chat, {"model": "m", "messages": [HELLO]}),
    (CompletionBody, COMPLETION_RULES, parse_completion, {"model": "m", "prompt": "Once"}),
]


@pytest.mark.parametrize(("kind", "rules", "parse", "plain"), TABLES)
def test_the_table_of_fields_says_what_happens(
    kind: type[SamplingBody], rules: Mapping[str, Rule], parse: Any, plain: dict[str, Any]
) -> None:
    def read(**fields: Any) -> Any:
        return parse({**plain, **fields}, limits=LIMITS, request_id="x")

    assert not rules.keys() & kind.model_fields
    usual = read()
    for name, rule in rules.items():
        call = read(**{name: None})
        assert (call.request, call.ignored) == (usual.request, ())
        for value in rule.neutral or ():
            assert read(**{name: value}).request == usual.request
        odd = {"of": "no", "meaning": "here"}
        if rule.is_passed_over:
            assert read(**{name: odd}).ignored == (name,)
            continue
        with pytest.raises(UnsupportedError) as caught:
            read(**{name: odd})
        assert caught.value.param == name
        assert caught.value.message.endswith(rule.note)
    optional = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    assert read(**optional).request == usual.request


@pytest.mark.parametrize(
    ("kind", "rules", "params"),
    [
        (ChatBody, CHAT_RULES, chat_create_params),
        (CompletionBody, COMPLETION_RULES, completion_create_params),
    ],
)
def test_every_field_of_openais_client_is_in_the_table_or_used(
    kind: type[SamplingBody], rules: Mapping[str, Rule], params: Any
) -> None:
    sent = get_type_hints(params.CompletionCreateParamsStreaming, vars(params))
    assert len(sent) > 15
    assert sent.keys() <= {*kind.model_fields, *rules}


PARTS = st.one_of(
    st.sampled_from(["", " ", "a", "bc"]).map(TextPart), st.just(ImagePart(b"x", "somewhere"))
)
MESSAGES = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant"]),
    st.lists(PARTS, max_size=3).map(tuple),
)


@given(st.lists(MESSAGES, min_size=1, max_size=7))
@settings(max_examples=500, deadline=None)
def test_messages_in_any_order_become_turns_that_every_template_takes_whole(
    messages: list[Message],
) -> None:
    turns = arrange_turns(messages)
    assert find_problem(turns) is None or not turns
    said = "".join(join_text(message).replace(" ", "") for message in messages)
    told = "".join(join_text(turn).replace(" ", "").replace("\n", "") for turn in turns)
    assert sorted(told) == sorted(said)
    assert count_images(turns) == count_images(messages)
    assert all(turn.role == "user" or not count_images([turn]) for turn in turns)
    assert turns[-1].role == "user" or not is_blank(turns[-1].parts)


def test_unknown_fields_are_named_in_a_header_or_refused_by_one_setting() -> None:
    call = parse_chat({"model": "m", "messages": [HELLO], "zz": 1}, limits=LIMITS, request_id="x")
    assert call.ignored == ("zz",)
    strict = LIMITS.model_copy(update={"unknown_fields": "refuse"})
    hints = {
        "temprature": "did you mean 'temperature'?",
        "max_token": "did you mean 'max_tokens'?",
        "repetition_penaltie": "did you mean 'repetition_penalty'?",
        "id": "leave it out",
        "zz": "leave it out",
    }
    for name, hint in hints.items():
        with pytest.raises(RequestError, match="unknown field") as caught:
            parse_chat({"model": "m", "messages": [HELLO], name: 1}, limits=strict, request_id="x")
        assert caught.value.param == name
        assert hint in caught.value.message
    passed = {"model": "m", "messages": [HELLO], "user": "ann", "zz": None}
    assert parse_chat(passed, limits=strict, request_id="x").ignored == ("user",)


def test_the_header_of_ignored_fields_is_short_and_printable() -> None:
    names = ["a" * 1000, "new\r\nline", "\u00e9\ud800", *map(str, range(100))]
    value = write_ignored(names)
    assert len(value) < 1000
    assert value.isascii()
    assert value.isprintable()


def test_the_error_of_a_limit_names_the_field_that_was_sent() -> None:
    async def ask() -> None:
        async with run_nearby(limits={"max_tokens": 5, "excess_max_tokens": "refuse"}) as there:
            for name in ("max_tokens", "max_completion_tokens"):
                error = (await there.say("Hello", **{name: 6})).json()["error"]
                assert error["param"] == name
                assert error["message"].startswith(f"{name}=6 is more than the 5 allowed")
            assert (await there.say("Hello", max_tokens=5)).status_code == 200

    asyncio.run(ask())


def test_too_large_a_limit_is_cut_by_default() -> None:
    async def ask() -> None:
        async with run_nearby(limits={"max_tokens": 5}) as there:
            assert (await there.say("Hello", max_tokens=10**9)).status_code == 200
            assert there.talker.last_request is not None
            assert there.talker.last_request.sampling.max_tokens == 5

    asyncio.run(ask())


def test_continuous_usage_stands_in_every_event() -> None:
    async def ask() -> None:
        async with run_nearby() as there:
            options = {"include_usage": True, "continuous_usage_stats": True}
            reply = await there.say("Hello", stream=True, stream_options=options)
            lines = [line for line in reply.text.splitlines() if line.startswith("data: {")]
            usages = [json.loads(line.removeprefix("data: "))["usage"] for line in lines]
            counts = [usage["completion_tokens"] for usage in usages]
            assert counts == [0, 1, 2, 3, 3, 3]
            assert all(a <= b for a, b in itertools.pairwise(counts))
            assert {usage["prompt_tokens"] for usage in usages} == {7}

    asyncio.run(ask())
