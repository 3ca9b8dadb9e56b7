"""`serve/openai/`: what is read from a request, what is refused and how, what is written."""

import copy
import json
import pickle
import random
from typing import Any

import pytest

from llava_ray.errors import (
    ContextLengthError,
    EngineError,
    ImageError,
    LlavaRayError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    RequestTooLargeError,
    UnsupportedError,
)
from llava_ray.serve.openai import errors
from llava_ray.serve.openai.call import ApiCall
from llava_ray.serve.openai.chat import parse_chat
from llava_ray.serve.openai.streaming import (
    ChatFormatter,
    ChunkEncoder,
    CompletionFormatter,
    ResponseMeta,
    build_completion,
)
from llava_ray.serve.usage import count_usage
from llava_ray.types import (
    ChatRequest,
    Chunk,
    ImagePart,
    Message,
    Sampling,
    TextPart,
    TokenLogprob,
)
from tests.support.openai_bodies import HELLO, IMAGE, LIMITS, PNG, URL, body


def read(value: Any) -> ApiCall:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_chat(data, limits=LIMITS, request_id="chatcmpl-1")


def refuse(value: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(value)
    assert caught.value.status == 400
    return caught.value


def test_a_plain_request_becomes_a_record_with_openais_defaults() -> None:
    call = read(body())
    messages = (Message("user", (TextPart("Hello"),)),)
    assert call.request == ChatRequest("chatcmpl-1", "m", messages, Sampling(may_cut=True))
    assert (call.stream, call.include_usage, call.meta.num_answers) == (False, False, 1)
    assert call.request.sampling == Sampling(None, 1.0, 1.0, (), None, False, may_cut=True)
    assert parse_chat(body(), limits=LIMITS, request_id="chatcmpl-1").request == call.request


def test_every_option_arrives() -> None:
    call = read(
        body(
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=7,
            temperature=0,
            top_p=0.5,
            stop=["a", "b"],
            seed=-3,
            ignore_eos=True,
            top_k=40,
            min_p=0.1,
            presence_penalty=-1,
            frequency_penalty=0.5,
            repetition_penalty=1.2,
            logit_bias={"7": -100, "11": 2.5},
            min_tokens=3,
            stop_token_ids=[2, 5],
            logprobs=True,
            top_logprobs=4,
            n=3,
            best_of=3,
        )
    )
    assert call.request.num_answers == call.meta.num_answers == call.meta.answers_each == 3
    assert call.request.sampling == Sampling(
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        stop=("a", "b"),
        seed=-3,
        ignore_eos=True,
        top_k=40,
        min_p=0.1,
        presence_penalty=-1,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias=((7, -100), (11, 2.5)),
        min_tokens=3,
        stop_token_ids=(2, 5),
        num_logprobs=4,
        may_cut=True,
    )
    assert (call.stream, call.include_usage) == (True, True)
    assert read(body(max_tokens=9)).request.sampling.max_tokens == 9
    assert read(body(max_tokens=9, max_completion_tokens=9)).request.sampling.max_tokens == 9
    assert read(body(stop="end")).request.sampling.stop == ("end",)
    nulls = dict.fromkeys(("stream", "max_tokens", "temperature", "top_p", "stop", "seed", "tools"))
    assert read(body(**nulls)).request == read(body()).request


def test_images_keep_their_place_and_say_where_they_stood() -> None:
    bare = {"type": "image_url", "image_url": URL, "detail": "high", "uuid": "x"}
    content = [{"type": "text", "text": "this"}, IMAGE, {"type": "text", "text": "or"}, bare]
    (message,) = read(body({"role": "user", "content": content})).request.messages
    assert message.parts == (
        TextPart("this"),
        ImagePart(PNG, "messages[0].content[1].image_url.url"),
        TextPart("or"),
        ImagePart(PNG, "messages[0].content[3].image_url"),
    )


def test_developers_are_systems_and_neighbours_of_one_role_become_one_turn() -> None:
    call = read(
        body(
            {"role": "system", "content": "Be kind."},
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "One", "name": "Ann"},
            {"role": "user", "content": [IMAGE]},
            {"role": "assistant", "content": "", "refusal": None, "tool_calls": []},
            HELLO,
        )
    )
    newline = TextPart("\n")
    image = ImagePart(PNG, "messages[3].content[0].image_url.url")
    assert call.request.messages == (
        Message("system", (TextPart("Be kind."), newline, TextPart("Be brief."))),
        Message("user", (TextPart("One"), newline, image)),
        Message("assistant", (TextPart(""),)),
        Message("user", (TextPart("Hello"),)),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "ann", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "logit_bias": {}},
        {"response_format": {"type": "text"}, "modalities": ["text"], "frequency_penalty": 0},
        {"response_format": {"type": None}, "stream_options": {"include_usage": None}},
        {"stream_options": {"include_usage": False, "of_tomorrow": 1}, "stream": False},
        {"response_format": None, "audio": None, "logprobs": None, "n": None, "top_k": -1},
    ],
)
def test_fields_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert read(body(**fields)).request == read(body()).request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("best_of", 3),
        ("chat_template", "{{ x }}"),
        ("priority", 5),
        ("service_tier", "flex"),
    ],
)
def test_what_cannot_be_done_is_named_with_the_remedy(field: str, value: Any) -> None:
    error = refuse(body(**{field: value}))
    assert isinstance(error, UnsupportedError)
    assert error.code == "unsupported_parameter"
    assert error.param == field
    assert field in error.message
    assert "not supported by this server: " in error.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": None}, "model", "/v1/models"),
        ({"model": 3}, "model", "/v1/models"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        ({"stream": True, "stream_options": []}, "stream_options", "an object like"),
        ({"max_tokens": 0}, "max_tokens", "an integer of at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "an integer of at least 1"),
        ({"max_tokens": True}, "max_tokens", "an integer of at least 1"),
        ({"max_tokens": "9"}, "max_tokens", "an integer of at least 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "disagree"),
        ({"temperature": -0.1}, "temperature", "a number from 0 to 2"),
        ({"temperature": 2.1}, "temperature", "a number from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "a number from 0 to 2"),
        ({"temperature": 10**400}, "temperature", "a number from 0 to 2"),
        ({"top_p": -0.1}, "top_p", "a number from 0 to 1"),
        ({"top_p": 1.01}, "top_p", "a number from 0 to 1"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"seed": 1.5}, "seed", "an integer"),
        ({"stop": 3}, "stop", "a list of at most 16"),
        ({"stop": ["a", 1]}, "stop[1]", "a string"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": "\ud800"}, "stop[0]", "unicode"),
        ({"ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"response_format": "json"}, "response_format", '"json_object"'),
        ({"response_format": {"type": "xml"}}, "response_format.type", "use text, json_object"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing or null",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
            "response_format.json_schema.schema",
            "which is an object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"scheme": {}}}},
            "response_format.json_schema.schema",
            "missing or null",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "name": 3}}},
            "response_format.json_schema.name",
            "a string",
        ),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"n": True}, "n", "from 1 to 128"),
        ({"n": 65}, "n", "the 64 answers allowed"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"top_k": -2}, "top_k", "0 or -1 means all"),
        ({"min_p": 1.5}, "min_p", "a number from 0 to 1"),
        ({"presence_penalty": 2.1}, "presence_penalty", "a number from -2 to 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty", "a number from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "a number from 0.01 to 100"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "a number from 0.01 to 100"),
        ({"logit_bias": {"red": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "from -100 to 100"),
        ({"logit_bias": [1]}, "logit_bias", "from -100 to 100"),
        ({"min_tokens": -1}, "min_tokens", "from 0 to max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "more than the 4 tokens"),
        ({"continue_final_message": True}, "continue_final_message", "no last message of the"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "always answered"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "token ids"),
        ({"stop_token_ids": 3}, "stop_token_ids", "token ids"),
        ({"messages": None}, "messages", "send a list like"),
        ({"messages": "Hello"}, "messages", "send a list like"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [HELLO] * 7}, "messages", "more than the 6 allowed"),
    ],
)
def test_a_bad_field_is_named_with_the_remedy(
    fields: dict[str, Any], param: str, words: str
) -> None:
    error = refuse(body(**fields))
    assert error.param == param
    assert words in error.message
    assert len(error.message) < 300


def test_a_response_format_becomes_a_json_schema() -> None:
    def schema(value: Any) -> Any:
        found = read(body(response_format=value)).request.sampling.json_schema
        return found and json.loads(found)

    assert schema({"type": "text"}) is None
    assert schema({"type": "json_object"}) == {"type": "object"}
    asked = {"name": "n", "strict": True, "description": None, "schema": {"enum": ["\u00e9"]}}
    assert schema({"type": "json_schema", "json_schema": asked}) == {"enum": ["\u00e9"]}


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (None, "messages[0]", "send an object like"),
        ("Hello", "messages[0]", "send an object like"),
        ({"content": "Hello"}, "messages[0].role", "missing"),
        ({"role": "usr", "content": "Hello"}, "messages[0].role", "system, developer, user"),
        ({"role": ["user"], "content": "Hello"}, "messages[0].role", "system, developer, user"),
        ({"role": "user"}, "messages[0].content", "is empty"),
        ({"role": "user", "content": None}, "messages[0].content", "is empty"),
        ({"role": "user", "content": 3}, "messages[0].content", "is a number"),
        ({"role": "user", "content": ""}, "messages[0].content", "is empty"),
        ({"role": "user", "content": " \n"}, "messages[0].content", "is empty"),
        ({"role": "user", "content": []}, "messages[0].content", "is empty"),
        ({"role": "user", "content": "\udfff"}, "messages[0].content", "surrogate"),
        ({"role": "user", "content": ["\udfff"]}, "messages[0].content[0].text", "surrogate"),
        ({"role": "system", "content": ""}, "messages[0].content", "is empty"),
        ({"role": "assistant", "content": ""}, "messages[0].content", "is empty"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "messages[0].tool_calls[0]",
            "is not a tool call",
        ),
        ({"role": "assistant", "tool_calls": 3}, "messages[0].tool_calls", "send a list"),
    ],
)
def test_a_bad_message_is_named_with_the_remedy(message: Any, param: str, words: str) -> None:
    error = refuse(body(message))
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(
    ("part", "place", "words"),
    [
        (3, "", "send a part like"),
        ({}, ".type", "use text or image_url"),
        ({"type": "txt", "text": "x"}, ".type", "use text or image_url"),
        ({"type": ["text"]}, ".type", "use text or image_url"),
        ({"type": "text", "text": 3}, ".text", "send a string"),
        ({"type": "input_audio", "input_audio": {}}, ".type", "audio in messages"),
        ({"type": "video_url", "video_url": {}}, ".type", "video in messages"),
        ({"type": "image_url"}, ".image_url", "data:image/png"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url", "data:image/png"),
        ({"type": "image_url", "image_url": {"url": 3}}, ".image_url.url", "data:image/png"),
        (
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            ".image_url.url",
            "download the image",
        ),
        ({"type": "image_url", "image_url": "file:///etc/passwd"}, ".image_url", "data URL"),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "huge"}},
            ".image_url.detail",
            "auto, low, high",
        ),
    ],
)
def test_a_bad_part_is_named_with_the_remedy(part: Any, place: str, words: str) -> None:
    error = refuse(body({"role": "user", "content": [{"type": "text", "text": "x"}, part]}))
    assert error.param == f"messages[0].content[1]{place}"
    assert words in error.message


def test_the_images_of_all_messages_are_counted() -> None:
    two = {"role": "user", "content": [IMAGE, IMAGE]}
    error = refuse(body(two, {"role": "assistant", "content": "x"}, two))
    assert error.param == "messages[2].content"
    assert "more than the 3 images" in error.message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[]", "a list: send a JSON object"),
        (b"null", "send a JSON object"),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b'{"temperature": -Infinity}', "-Infinity is not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(data: bytes, words: str) -> None:
    assert words in refuse(data).message


def test_deep_and_long_values_are_refused_in_a_short_message() -> None:
    for depth in (50, 400, 900, 990):
        error = refuse(b'{"model":"m","messages":[],"tools":' + b"[" * depth + b"]" * depth + b"}")
        assert len(error.message) < 200
    strict = LIMITS.model_copy(update={"unknown_fields": "refuse"})
    with pytest.raises(RequestError) as caught:
        parse_chat(body(**{"x" * 10_000: 1}), limits=strict, request_id="x")
    assert len(caught.value.message) < 200
    assert len(refuse(body(temperature="x" * 10_000)).message) < 300
    assert len(refuse(body({"role": "x" * 10_000, "content": "x"})).message) < 200


def test_nan_in_a_dictionary_is_refused_like_any_number_out_of_bounds() -> None:
    with pytest.raises(RequestError, match="a number from 0 to 2"):
        parse_chat(body(temperature=float("nan")), limits=LIMITS, request_id="x")


def test_mutated_requests_give_a_request_or_a_request_error_and_nothing_else() -> None:
    dice = random.Random(0)
    content = [{"type": "text", "text": "x"}, IMAGE]
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": content}]
    options = {"stop": ["a"], "stream": True, "stream_options": {"include_usage": True}}
    whole = body(*turns, **options, temperature=0.5, max_tokens=3, tools=[], n=1, seed=1)
    odd = [None, True, 0, -1, 2**70, 1.5, 1e999, "", "\ud800", "user", URL, [], {}, [[]], {"": 0}]
    num_good = 0
    for _ in range(4000):
        value = json.loads(json.dumps(whole))
        for _ in range(dice.choice((1, 1, 2, 4))):
            mutate(value, dice, odd)
        try:
            num_good += isinstance(read(value), ApiCall)
        except RequestError as error:
            json.dumps(errors.describe_error(error).body)
    assert 100 < num_good < 3000


def mutate(value: Any, dice: random.Random, odd: list[Any]) -> None:
    """Replace, remove or add one thing somewhere in a JSON value."""
    places = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    if not places:
        return
    node, key = dice.choice(places)
    what = dice.random()
    if what < 0.6:
        node[key] = copy.deepcopy(dice.choice(odd))
    elif what < 0.8:
        del node[key]
    elif isinstance(node, dict):
        node[dice.choice(["x", "role", "detail", "url", "n", "\ud800"])] = copy.deepcopy(
            dice.choice(odd)
        )
    else:
        node.append(copy.deepcopy(dice.choice(odd)))


def test_errors_have_the_status_type_and_headers_that_clients_expect() -> None:
    cases = {
        RequestError: (400, "invalid_request_error", "invalid_request"),
        ImageError: (400, "invalid_request_error", "invalid_image"),
        ContextLengthError: (400, "invalid_request_error", "context_length_exceeded"),
        UnsupportedError: (400, "invalid_request_error", "unsupported_parameter"),
        RequestTooLargeError: (413, "invalid_request_error", "request_too_large"),
        ModelNotFoundError: (404, "not_found_error", "model_not_found"),
        OverloadedError: (503, "service_unavailable_error", "overloaded"),
        EngineError: (500, "server_error", "engine_error"),
        LlavaRayError: (500, "server_error", "internal_error"),
    }
    for kind, (status, error_type, code) in cases.items():
        reply = errors.describe_error(pickle.loads(pickle.dumps(kind("what", param="where"))))
        expected = {"message": "what", "type": error_type, "param": "where", "code": code}
        assert reply.status == status
        assert reply.body == {"error": expected}
        assert reply.headers.get("x-should-retry") == ("false" if status < 500 else None)
        assert ("Retry-After" in reply.headers) == (status == 503)


CHUNKS = [
    Chunk("A ", None, 1, 10, 4),
    Chunk("", None, 2, 10, 4),
    Chunk('"\u00e9\n\U0001f600', None, 3, 10, 4),
    Chunk(".", "stop", 4, 10, 4),
]


META = ResponseMeta("chatcmpl-1", '"m"', 5)


def decode(events: bytes) -> list[dict[str, Any]]:
    *written, rest = events.decode().split("\n\n")
    assert rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in written]


def test_a_completion_joins_the_chunks_and_counts_image_tokens() -> None:
    value = build_completion(CHUNKS, ChatFormatter(has_logprobs=False), META)
    assert value["choices"][0]["message"]["content"] == 'A "\u00e9\n\U0001f600.'
    assert value["choices"][0]["finish_reason"] == "stop"
    assert value["choices"][0]["logprobs"] is None
    assert value["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "total_tokens": 14,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "image_tokens": 4,
            "text_tokens": 6,
            "multimodal_tokens": {"image": 4},
        },
    }


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_is_role_then_text_then_the_reason_then_usage(include_usage: bool) -> None:
    encoder = ChunkEncoder(ChatFormatter(has_logprobs=False), META, include_usage=include_usage)
    assert encoder.encode(Chunk("", None, 0, 10, 4)).startswith(b"data: {")
    assert encoder.encode(Chunk("", None, 0, 10, 4)) == b""
    values = decode(b"".join(encoder.encode(chunk) for chunk in CHUNKS))
    assert all(value["id"] == "chatcmpl-1" and value["model"] == '"m"' for value in values)
    if include_usage:
        usage = values.pop()
        assert usage["choices"] == []
        assert usage["usage"] == errors.describe_usage(count_usage(CHUNKS[-1:]))
        assert all(value["usage"] is None for value in values)
    else:
        assert all("usage" not in value for value in values)
    choices = [value["choices"][0] for value in values]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == (
        'A "\u00e9\n\U0001f600.'
    )
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert choices[-1]["delta"] == {}


TWO = [
    Chunk("A", None, 1, 10, 4, 1),
    Chunk("B", None, 1, 10, 4, 0),
    Chunk("b", "length", 2, 10, 4, 0),
    Chunk("a", "stop", 3, 10, 4, 1),
]


def test_several_answers_are_told_apart_and_their_prompt_counts_once() -> None:
    meta = META._replace(answers_each=2, num_answers=2)
    value = build_completion(TWO, ChatFormatter(has_logprobs=False), meta)
    told = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in value["choices"]]
    assert told == [(0, "Bb", "length"), (1, "Aa", "stop")]
    usage = value["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (10, 5)
    encoder = ChunkEncoder(ChatFormatter(has_logprobs=False), meta, include_usage=True)
    *events, last = decode(b"".join(encoder.encode(chunk) for chunk in TWO))
    choices = [event["choices"][0] for event in events]
    assert [choice["index"] for choice in choices] == [1, 1, 0, 0, 0, 0, 1, 1]
    assert [choice["delta"].get("role") for choice in choices].count("assistant") == 2
    assert last["usage"] == usage
    two_prompts = count_usage([TWO[2], TWO[3]], answers_each=1)
    assert (two_prompts.num_prompt_tokens, two_prompts.num_image_tokens) == (20, 8)


SPELLED = [
    Chunk("A ", None, 1, 10, 0, 0, (TokenLogprob(b"A ", -0.5, ((b"A ", -0.5), (b"B", -1.0))),)),
    Chunk(
        "\u00e9",
        "stop",
        3,
        10,
        0,
        0,
        (TokenLogprob(b"\xc3", -0.25), TokenLogprob(b"\xa9", float("-inf"))),
    ),
]


def test_logprobs_of_a_chat_are_a_list_of_tokens_with_their_bytes() -> None:
    formatter = ChatFormatter(has_logprobs=True)
    whole = build_completion(SPELLED, formatter, META)["choices"][0]["logprobs"]
    assert whole == {
        "content": [
            {
                "token": "A ",
                "logprob": -0.5,
                "bytes": [65, 32],
                "top_logprobs": [
                    {"token": "A ", "logprob": -0.5, "bytes": [65, 32]},
                    {"token": "B", "logprob": -1.0, "bytes": [66]},
                ],
            },
            {"token": "\ufffd", "logprob": -0.25, "bytes": [0xC3], "top_logprobs": []},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xA9], "top_logprobs": []},
        ],
        "refusal": None,
    }
    encoder = ChunkEncoder(formatter, META, include_usage=False)
    events = decode(b"".join(encoder.encode(chunk) for chunk in SPELLED))
    streamed = [event["choices"][0]["logprobs"] for event in events]
    assert [part for told in streamed if told for part in told["content"]] == whole["content"]


def test_logprobs_of_a_plain_completion_are_lists_side_by_side() -> None:
    whole = build_completion(SPELLED, CompletionFormatter(has_logprobs=True), META)
    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["text"] == "A \u00e9"
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["A ", "\ufffd", "\ufffd"],
        "token_logprobs": [-0.5, -0.25, -9999.0],
        "top_logprobs": [{"A ": -0.5, "B": -1.0}, {"\ufffd": -0.25}, {"\ufffd": -9999.0}],
        "text_offset": [0, 2, 3],
    }
    encoder = ChunkEncoder(CompletionFormatter(has_logprobs=True), META, include_usage=False)
    events = decode(b"".join(encoder.encode(chunk) for chunk in SPELLED))
    told = [event["choices"][0]["logprobs"] for event in events]
    assert [part["text_offset"] for part in told if part] == [[0], [2, 3]]
    assert [event["choices"][0]["text"] for event in events] == ["A ", "\u00e9", ""]
