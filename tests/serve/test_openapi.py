"""The OpenAPI document is correct, and no body makes a parser fail with another error."""

import json
from typing import Any, cast

import jsonschema
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Mount

from llava_ray.config import ModelConfig, ServeConfig
from llava_ray.errors import RequestError
from llava_ray.serve.gateway.deployment import build_api
from llava_ray.serve.openai.chat import parse_chat
from llava_ray.serve.openai.completions import parse_completion, parse_detokenize, parse_tokenize
from llava_ray.serve.openai.openapi import describe_api
from tests.support.local_gateway import Talker
from tests.support.openai_bodies import IMAGE, LIMITS

API = describe_api(["m"])
HELLO = [{"role": "user", "content": "Hello"}]
GOOD = {
    "ChatBody": {"model": "m", "messages": HELLO},
    "CompletionBody": {"model": "m", "prompt": "Once"},
    "TokenizeBody": {"prompt": "Once"},
    "DetokenizeBody": {"tokens": [1]},
}
PARSERS = {
    "ChatBody": lambda body: parse_chat(body, limits=LIMITS, request_id="x"),
    "CompletionBody": lambda body: parse_completion(body, limits=LIMITS, request_id="x"),
    "TokenizeBody": lambda body: parse_tokenize(body, limits=LIMITS),
    "DetokenizeBody": lambda body: parse_detokenize(body, limits=LIMITS),
}
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.integers(-(2**70), 2**70),
    st.floats(-3, 3),
    st.text(max_size=5),
    st.sampled_from(["text", "user", "auto", "none", "json_object", "json_schema", "\ud800"]),
)
NAMES = st.sampled_from(["type", "role", "content", "text", "image_url", "url", "schema", "1"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
THOROUGH = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def describe(body: str) -> Any:
    schema = {"$ref": f"#/components/schemas/{body}", "components": API["components"]}
    return jsonschema.Draft202012Validator(schema)


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def refuse(name: str, body: bytes) -> RequestError | None:
    """Return the `RequestError` with which a body is refused; any other exception is raised."""
    try:
        PARSERS[name](body)
    except RequestError as error:
        return error if error.status == 400 else None
    return None


@pytest.mark.parametrize("name", sorted(API["components"]["schemas"]))
def test_every_schema_of_the_document_is_one(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(API["components"]["schemas"][name])
    assert describe(name).is_valid({}) in (True, False)  # all references lead somewhere


@pytest.mark.parametrize("name", GOOD)
@given(data=st.data())
@THOROUGH
def test_what_is_taken_is_described_and_what_is_not_is_a_400(name: str, data: Any) -> None:
    fields = st.sampled_from(sorted(API["components"]["schemas"][name]["properties"]))
    changes = data.draw(st.dictionaries(fields | st.text(max_size=3), VALUES, max_size=3))
    body = {**GOOD[name], **changes}
    error = refuse(name, encode(body))
    if error is None:
        assert describe(name).is_valid({**body, "model": "m"}), body
    else:
        encode({"message": error.message, "param": error.param})


@pytest.mark.parametrize("name", GOOD)
@given(body=st.binary(max_size=40) | VALUES.map(encode))
@THOROUGH
def test_any_bytes_are_a_request_or_a_400(name: str, body: bytes) -> None:
    refuse(name, body)


@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=3) | st.just(HELLO[0]), max_size=4))
@THOROUGH
def test_any_messages_are_a_conversation_or_a_400(messages: list[Any]) -> None:
    body = {"model": "m", "messages": messages}
    error = refuse("ChatBody", encode(body))
    if error is None:
        assert describe("ChatBody").is_valid(body), body
    else:
        assert (error.param or "").startswith("messages")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "a"}]}]},
        {"stop": "end", "stream": True, "stream_options": {"include_usage": True}},
        {"logit_bias": {"7": -1}, "n": 2, "logprobs": True, "top_logprobs": 3, "seed": None},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"user": "ann", "metadata": {"a": "b"}, "tools": [], "tool_choice": "auto"},
    ],
)
def test_usual_requests_are_taken_and_described(body: dict[str, Any]) -> None:
    body = GOOD["ChatBody"] | body
    describe("ChatBody").validate(body)
    parse_chat(encode(body), limits=LIMITS, request_id="x")


def test_the_document_names_the_routes_that_the_gateway_has() -> None:
    config = ServeConfig(models=[ModelConfig(path="m", engine="echo")], page=False)
    gateway = build_api(config, {"m": cast(Any, Talker())})
    (v1,) = [route.app for route in gateway.routes if isinstance(route, Mount)]
    assert isinstance(v1, FastAPI)
    routes = [("", route) for route in gateway.routes] + [("/v1", route) for route in v1.routes]
    served = {
        prefix + route.path.replace(":path", "")
        for prefix, route in routes
        if isinstance(route, APIRoute)
    }
    also_without_v1 = {"/tokenize", "/detokenize", "/usage"}
    assert served - {"/openapi.json"} - {"/v1" + path for path in also_without_v1} == (
        set(API["paths"]) - also_without_v1
    )
