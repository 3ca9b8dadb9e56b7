"""schemathesis against the OpenAPI document: responses are as described, and nothing breaks.

Most generated bodies would be refused, because a document cannot say how fields depend on one
another; `mend` makes them consistent, so that most reach an engine.
"""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

from llava_ray.serve.openai.openapi import describe_api
from tests.support.image_urls import data_url, png
from tests.support.wait import PATIENCE_S

pytestmark = pytest.mark.ray

API = schemathesis.openapi.from_dict(describe_api(["echo", "other"]))
OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/usage", "GET"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
]
CHECKS = [
    checks.not_a_server_error,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
]
IMAGE = data_url(png(8, 8))
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        *[(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS],
        *[(*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if "POST" in operation],
    ],
    ids=str,
)
def test_no_request_breaks_the_server_and_answers_are_as_described(
    served: str, path: str, method: str, mode: GenerationMode
) -> None:
    statuses: Counter[int] = Counter()

    @QUICK
    @given(case=API[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = mend(case.body)
        reply = case.call(base_url=served, timeout=PATIENCE_S)
        statuses[reply.status_code] += 1
        case.validate_response(reply, checks=CHECKS)

    check()
    print(method, path, mode.value, dict(statuses))
    if mode is GenerationMode.POSITIVE:
        assert statuses[200] > statuses.total() / 2, statuses


def mend(body: dict[str, Any]) -> dict[str, Any]:
    """Return nearly the same body, with consistent fields."""
    body = {**mend_value(body), "model": body.get("model") or "echo"}
    unfit = ("best_of", "response_format", "suffix", "add_generation_prompt")
    for name in (*unfit, "continue_final_message"):
        body.pop(name, None)
    for name in ("prompt", "tokens"):
        if isinstance(body.get(name), list):
            body[name] = mend_tokens(body[name])
    if not body.get("stream"):
        body.pop("stream_options", None)
    if not body.get("logprobs") or body.get("echo"):
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        if body.get(name):
            body[name] = 7
    if body.get("n"):
        body["n"] = 2
    if messages := body.get("messages"):
        body.pop("prompt", None)
        body.pop("add_special_tokens", None)
        body["messages"] = [*messages, {"role": "user", "content": "Hello"}][-16:]
    elif not body.get("prompt") and "tokens" not in body:
        body["prompt"] = "Hello"
    return body


def mend_tokens(value: Any) -> Any:
    """Return a prompt or prompts with token ids that stand for letters."""
    if isinstance(value, list):
        return [mend_tokens(item) for item in value]
    return value % 50_000 if isinstance(value, int) else value


def mend_value(value: Any) -> Any:
    """Return a value with whole numbers, valid images and texts that are not empty."""
    match value:
        case float() if value.is_integer():
            return int(value)  # 1.0 is whole in JSON schema, and not here
        case {"image_url": _} | {"type": "image_url" | "input_image"}:
            return {"type": "image_url", "image_url": {"url": IMAGE}}
        case dict():
            return {name: mend_value(item) for name, item in value.items()}
        case list():
            return [mend_value(item) for item in value]
        case str() if not value.strip():
            return "Hello"
        case _:
            return value
