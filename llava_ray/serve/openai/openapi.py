"""The OpenAPI document of this server (`/openapi.json`), made from the models that check bodies.

The models leave messages and prompts open; their schemas are written here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic.json_schema import models_json_schema

from llava_ray import __version__
from llava_ray.serve.openai.fields import IGNORED_HEADER, Rule
from llava_ray.serve.openai.messages import (
    DETAILS,
    IMAGE_TYPES,
    PASSED_OVER_TYPES,
    ROLES,
    TEXT_FIELDS,
)
from llava_ray.serve.openai.protocol import (
    LARGEST_TOKEN_ID,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)

_DETAIL = {"enum": [*DETAILS]}
_TEXT_PARTS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"type": {"const": kind}, field: {"type": ["string", "null"]}},
        "required": ["type"],
    }
    for kind, field in TEXT_FIELDS.items()
]
_IMAGE_URL = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"url": {"type": "string"}, "detail": _DETAIL},
            "required": ["url"],
        },
    ]
}
_PART: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "null"},
        *_TEXT_PARTS,
        {
            "type": "object",
            "description": "`detail` has no effect: a model encodes images as it was trained to.",
            "properties": {
                "type": {"enum": [*IMAGE_TYPES]},
                "image_url": _IMAGE_URL,
                "detail": _DETAIL,
            },
            "required": ["type", "image_url"],
        },
        {
            "type": "object",
            "description": "reasoning of an earlier answer; models do not see it again",
            "properties": {"type": {"enum": [*PASSED_OVER_TYPES]}},
            "required": ["type"],
        },
        {
            "type": "object",
            "properties": {"type": {"type": "null"}, "text": {"type": ["string", "null"]}},
            "required": ["text"],
        },
        {
            "type": "object",
            "properties": {"type": {"type": "null"}, "image_url": _IMAGE_URL},
            "required": ["image_url"],
        },
    ]
}
_CONTENT = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}],
}
_NAMED = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
}
_CALLS = {
    "type": ["array", "null"],
    "description": "shown to the model as text",
    "items": {
        "anyOf": [
            {"type": "object", "properties": {kind: _NAMED}, "required": [kind]}
            for kind in ("function", "custom")
        ]
    },
}
_MESSAGE = {
    "description": "Fields that are not listed have no effect.",
    "anyOf": [
        {
            "type": "object",
            "properties": {"role": {"enum": [*roles]}, "content": _CONTENT, **more},
            "required": ["role"],
        }
        for roles, more in (
            ([role for role in ROLES if role != "assistant"], {}),
            (
                ["assistant"],
                {"tool_calls": _CALLS, "function_call": {"anyOf": [_NAMED, {"type": "null"}]}},
            ),
        )
    ],
}
_MESSAGES = {"type": "array", "items": {"$ref": "#/components/schemas/Message"}, "minItems": 1}
_TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": LARGEST_TOKEN_ID}
_TOKEN_IDS = {"type": "array", "items": _TOKEN_ID, "minItems": 1}
_PROMPT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _TOKEN_IDS,
        {
            "type": "array",
            "items": {"anyOf": [{"type": "string", "minLength": 1}, _TOKEN_IDS]},
            "minItems": 1,
        },
    ]
}
_STOP = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": ["string", "null"]}, "maxItems": 16},
        {"type": "null"},
    ]
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_MODEL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "max_model_len": {"type": ["integer", "null"]},
        "parent": {"type": ["string", "null"]},
    },
    "required": ["id", "object", "created", "owned_by"],
}
_HEADERS = {
    IGNORED_HEADER: {
        "description": "the fields of the request that had no effect, separated by commas",
        "schema": {"type": "string"},
    }
}
_EVENT = {
    "type": "object",
    "description": "one event: a chunk of the answer as JSON, an error, or [DONE]",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_COUNTS = (
    *("in_flight", "requests", "errors", "refused"),
    *("prompt_tokens", "completion_tokens", "total_tokens", "image_tokens"),
)
_USAGE = {
    "type": "object",
    "properties": {"key": {"type": "string"}, **{name: {"type": "integer"} for name in _COUNTS}},
    "required": ["key", *_COUNTS],
}
_STATES = {
    "type": "object",
    "properties": {
        "status": {"type": "string"},
        "models": {"type": "object"},
        "engines": {"type": "object"},
    },
    "required": ["status", "models"],
}
_COMPLETION = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["chat.completion", "text_completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object"}, "minItems": 1},
        "usage": {"type": "object"},
    },
    "required": ["id", "object", "created", "model", "choices", "usage"],
}


def describe_api(
    models: Sequence[str], *, unknown_fields: Literal["ignore", "refuse"] = "ignore"
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server with these models.

    Args:
        models: their names.
        unknown_fields: what happens to fields that are not in the document.
    """
    bodies = [ChatBody, CompletionBody, TokenizeBody, DetokenizeBody]
    _, described = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = described["$defs"]
    for body in (ChatBody, CompletionBody):
        schema = schemas[body.__name__]
        schema["properties"]["stop"] = _STOP | {
            "description": schema["properties"]["stop"]["description"]
        }
        schema["properties"]["logit_bias"]["anyOf"][0]["propertyNames"] = {
            "pattern": "^[0-9]{1,10}$"
        }
    for body in bodies:
        schema = schemas[body.__name__]
        _fill(schema, "model", {"enum": list(models)})
        schema["properties"] = _describe_unused(body.rules) | schema["properties"]
        schema["additionalProperties"] = unknown_fields == "ignore"
    _fill(schemas["ChatBody"], "messages", _MESSAGES)
    _fill(schemas["TokenizeBody"], "messages", _MESSAGES)
    _fill(schemas["CompletionBody"], "prompt", _PROMPT)
    schemas |= {"Message": _MESSAGE, "Error": _ERROR, "Model": _MODEL}
    schemas["Completion"] = _COMPLETION
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLaVA Ray", "version": __version__},
        "paths": {
            "/v1/models": {"get": _get("The models", _object(data=_array("Model")))},
            "/v1/models/{name}": {
                "get": _get("One model", _ref("Model"))
                | {
                    "parameters": [
                        {
                            "name": "name",
                            "in": "path",
                            "required": True,
                            "schema": {"enum": list(models)},
                        }
                    ]
                }
            },
            "/v1/chat/completions": {"post": _post("Continue a conversation", "ChatBody")},
            "/v1/completions": {"post": _post("Continue a text", "CompletionBody")},
            "/tokenize": {
                "post": _post(
                    "Text or conversation to tokens",
                    "TokenizeBody",
                    _object(
                        count={"type": "integer"},
                        max_model_len={"type": "integer"},
                        tokens={"type": "array", "items": {"type": "integer"}},
                    ),
                )
            },
            "/detokenize": {
                "post": _post(
                    "Tokens to text", "DetokenizeBody", _object(prompt={"type": "string"})
                )
            },
            "/usage": {
                "get": _get(
                    "Usage of the caller's key, or of all keys for an admin key; also at /v1/usage",
                    _object(
                        since={"type": "integer"},
                        complete={"type": "boolean"},
                        data={"type": "array", "items": _USAGE},
                    ),
                )
            },
            "/healthz": {"get": _get("The gateway is alive", {"type": "object"})},
            "/readyz": {"get": _get("Every model responds; 503: which do not", _STATES)},
            "/health": {"get": _get("The same as /readyz, under vLLM's name", _STATES)},
        },
        "components": {"schemas": schemas},
    }


def _describe_unused(rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Return the fields that have no effect, or may only ask for nothing."""
    return {
        name: {"description": f"no effect: {rule.note}"}
        if rule.neutral is None
        else {"enum": [*rule.neutral, None], "description": rule.note}
        for name, rule in rules.items()
    }


def _fill(schema: dict[str, Any], name: str, described: dict[str, Any]) -> None:
    field = schema["properties"][name]
    if "anyOf" in field and name not in schema.get("required", ()):
        described = {"anyOf": [described, {"type": "null"}]}
    schema["properties"][name] = described | {"description": field["description"]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _array(name: str) -> dict[str, Any]:
    return {"type": "array", "items": _ref(name)}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _get(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    found = {"description": "OK", "content": {"application/json": {"schema": schema}}}
    responses = {"200": found} | _failures()
    if schema is _STATES:
        responses["503"] = found | {"description": "Not ready"}
    return {"summary": summary, "responses": responses}


def _post(summary: str, body: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": schema or _ref("Completion")}}
    if schema is None:
        content["text/event-stream"] = {"schema": _EVENT}
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(body)}},
        },
        "responses": {"200": {"description": "OK", "content": content, "headers": _HEADERS}}
        | _failures(),
    }


def _failures() -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("Error")}}
    return {
        kind: {"description": meaning, "content": content}
        for kind, meaning in (
            ("4XX", "The caller can fix it; the message says how"),
            ("5XX", "Overloaded (503, with Retry-After), or a failure of the server"),
        )
    }
