"""Every parser of untrusted input either accepts it or raises one of our errors.

The parsers of the OpenAI API are in `test_openapi.py`.
"""

import base64
import json
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from llava_ray import images
from llava_ray.config import FetchConfig, LimitsConfig
from llava_ray.errors import ImageError, ImageUrlError, NotAllowedError, RequestError
from llava_ray.serve.fetch.ip_policy import is_public, read_address
from llava_ray.serve.fetch.url_policy import check_url
from llava_ray.serve.gateway.auth import BasicCredentials, read_basic_credentials, read_key
from llava_ray.serve.llava import protocol
from llava_ray.serve.llava.worker_registry import check_address
from llava_ray.serve.llava.worker_request import build_worker_request
from llava_ray.types import ImagePart, PromptRequest, Sampling

LIMITS = LimitsConfig(max_images=2)
PNG = base64.b64encode(b"\x89PNG").decode()
THOROUGH = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXTS = st.text(max_size=8) | st.sampled_from(["m", "<image>", "</s>", PNG, "1", "\ud800", ""])
NUMBERS = st.integers(-3, 600) | st.integers(-(2**70), 2**70) | st.floats(-3, 3)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
NAMES = st.sampled_from(["model_names", "speed", "queue_length", "text", "1"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=6,
)
BODIES: dict[type[protocol.Body], dict[str, Any]] = {
    protocol.ModelBody: {"model": "m"},
    protocol.GenerateBody: {"model": "m", "prompt": "Hello <image>", "images": [PNG]},
    protocol.StatusBody: {"model_names": ["m"], "speed": 1, "queue_length": 0},
    protocol.RegisterBody: {"worker_name": "http://a:1", "check_heart_beat": True},
    protocol.HeartBeatBody: {"worker_name": "http://a:1", "queue_length": 0},
    protocol.AnswerBody: {"text": "Hello"},
}
KINDS = pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def read(kind: type[protocol.Body], body: bytes) -> protocol.Body | None:
    """The fields of a body; None if it is refused with what its client expects."""
    try:
        return protocol.parse(kind, body)
    except RequestError as error:
        told, status = error, error.status
    text, code = json.loads(protocol.encode_error(told).removesuffix(protocol.END)).values()
    assert text
    assert (status, code) == (400, protocol.FAILED)
    return None


@KINDS
@given(data=st.data())
@THOROUGH
def test_a_body_of_llavas_protocol_is_what_it_says_or_refused(
    kind: type[protocol.Body], data: Any
) -> None:
    names = st.sampled_from(sorted(kind.model_fields)) | st.text(max_size=3)
    body = BODIES[kind] | data.draw(st.dictionaries(names, VALUES, max_size=3))
    fields = read(kind, encode(body))
    assert fields is None or kind.model_validate_json(fields.model_dump_json()) == fields


@KINDS
@given(body=st.binary(max_size=40) | VALUES.map(encode))
@THOROUGH
def test_any_bytes_are_a_body_of_llavas_protocol_or_refused(
    kind: type[protocol.Body], body: bytes
) -> None:
    read(kind, body)


@given(
    st.fixed_dictionaries(
        {"model": TEXTS, "prompt": TEXTS},
        optional={
            "images": st.none() | st.lists(st.binary(max_size=9).map(base64.b64encode)),
            "temperature": NUMBERS | TEXTS,
            "top_p": NUMBERS,
            "max_new_tokens": NUMBERS | TEXTS,
            "stop": st.none() | TEXTS | st.lists(TEXTS, max_size=3),
        },
    )
)
@THOROUGH
def test_what_is_to_be_generated_is_a_request_within_the_limits_or_refused(
    body: dict[str, Any],
) -> None:
    if body.get("images"):
        body["images"] = [image.decode() for image in body["images"]]
    try:
        asked = protocol.parse_generate(encode(body), limits=LIMITS, request_id="r")
    except RequestError as error:
        protocol.encode_error(error)
        return
    assert len(asked.images) <= 2
    assert asked.sampling.max_tokens is not None
    assert asked.sampling.max_tokens >= 1
    assert 0 <= asked.sampling.temperature <= 2
    assert 0 < asked.sampling.top_p <= 1
    assert all(text.strip() for text in asked.sampling.stop)
    for text in (asked.model, asked.prompt, *asked.sampling.stop):
        text.encode()  # no half of a surrogate pair goes on its way


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=5), max_size=3), st.binary())
def test_what_a_worker_is_asked_comes_out_of_the_parser_as_it_went_in(
    prompt: str, stop: list[str], image: bytes
) -> None:
    asked = PromptRequest(
        "r",
        "m",
        prompt.replace("<", "") + "<image>",
        (ImagePart(image or b"x", "images[0]"),),
        Sampling(9, 0.5, 0.5, tuple(text for text in stop if text.strip())[:1]),
    )
    body = encode(build_worker_request(asked).body)
    understood = protocol.parse_generate(body, limits=LIMITS, request_id="r")
    assert understood.images == asked.images
    assert understood.prompt == asked.prompt
    assert understood.sampling.stop == (asked.sampling.stop or ("</s>",))


@given(st.text(), st.integers(0, 9))
def test_an_answers_object_is_read_as_it_was_written(text: str, code: int) -> None:
    item = protocol.encode_text(text, code)
    assert item.count(b"\0") == 1
    answer = protocol.parse(protocol.AnswerBody, item.removesuffix(protocol.END))
    assert (answer.text, answer.error_code) == (text, code)


ODD = [
    "127.0.0.1",
    "[::1]",
    "0x7f.1",
    "2130706433",
    "[::ffff:10.0.0.1]",
    "a.b",
    "%2e",
    "①",
    "@",
    ":",
]
PIECES = st.lists(st.text(max_size=4) | st.sampled_from([*ODD, "http:", "//", "/", "\\", "?", "#"]))


@given(PIECES.map("".join) | PIECES.map(lambda pieces: "http://" + "".join(pieces)))
@THOROUGH
def test_any_text_is_a_public_web_address_or_refused(text: str) -> None:
    try:
        link = check_url(text, FetchConfig(hosts=["*"]), param="p")
    except ImageUrlError as error:
        encode(error.message)
        return
    again = urlsplit(str(link))  # another parser sees the same host
    host = link.raw_host.decode("ascii")
    assert (again.scheme, again.hostname) == (link.scheme, host)
    assert again.username is None
    address = read_address(host)
    assert address is None or is_public(address)


@given(PIECES.map("".join))
def test_only_listed_addresses_are_those_of_workers(text: str) -> None:
    for address in (text, f"http://gpu-1:{text}", f"http://{text}"):
        try:
            checked = check_address(address, ["http://gpu-1:40000", "http://gpu-2:*"])
        except NotAllowedError as error:
            encode(error.message)
        else:
            host, _, port = checked.removeprefix("http://").partition(":")
            assert (host, port) == ("gpu-1", "40000") or (host == "gpu-2" and port.isdecimal())


@given(st.text(alphabet=st.characters(max_codepoint=255), max_size=20))
def test_any_header_is_a_key_or_none(text: str) -> None:
    for value in (text, f"Bearer {text}", f"Basic {text}"):
        key = read_key(Headers({"authorization": value}))
        assert key in value or value.lower().startswith("basic ")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=":")), st.text())
def test_a_login_comes_out_as_it_went_in(name: str, password: str) -> None:
    password = password.encode(errors="ignore").decode()
    encoded = base64.b64encode(f"{name}:{password}".encode()).decode()
    assert read_basic_credentials(
        Headers({"authorization": f"Basic {encoded}"})
    ) == BasicCredentials(name, password)


@given(
    st.binary(max_size=30) | st.text(max_size=30).map(lambda text: text.encode(errors="replace"))
)
@THOROUGH
def test_any_data_url_is_bytes_or_refused(data: bytes) -> None:
    text = data.decode("latin-1")
    for url in (text, f"data:{text}", f"data:image/png;base64,{text}", f"data:,{quote(data)}"):
        try:
            images.decode_data_url(url, limits=LIMITS, param="p")
        except ImageError as error:
            encode(error.message)
    encoded = base64.b64encode(data).decode()
    if data:
        url = f"data:image/png;base64,{encoded}"
        assert images.decode_data_url(url, limits=LIMITS, param="p") == data
