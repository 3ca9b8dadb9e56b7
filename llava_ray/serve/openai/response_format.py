"""The field `response_format`: -> the JSON schema that an answer must follow, as text."""

import json
from typing import Any

from llava_ray.errors import RequestError
from llava_ray.serve.openai.validation import check_unicode, kind_of, show

MAX_SCHEMA_CHARACTERS = 100_000
_ANY_OBJECT = {"type": "object"}


def read_format(value: dict[str, Any] | None) -> str | None:
    """Return the JSON schema that a response format asks for, as text; None: plain text.

    The model's replica decides whether it supports the schema.

    Raises:
        RequestError: it is none of the three formats, or the schema is invalid.
    """
    if value is None:
        return None
    match value.get("type"):
        case "text" | None:
            return None
        case "json_object":
            if value.get("schema") is None:
                return json.dumps(_ANY_OBJECT)
            return _read_schema(value, "response_format")  # as in llama.cpp and Together
        case "json_schema":
            return _read_schema(value.get("json_schema"), "response_format.json_schema")
    raise RequestError(
        f"response_format.type is {show(value.get('type'))}: use text, json_object or json_schema",
        param="response_format.type",
    )


def _read_schema(value: Any, path: str) -> str:
    if not isinstance(value, dict):
        raise RequestError(
            f'{path} is {kind_of(value)}: send {{"name": "answer", "schema": {{...}}}}', param=path
        )
    for name, kind in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(value.get(name), kind | None):
            raise RequestError(
                f"{path}.{name} is {kind_of(value[name])}: "
                f"{'true or false' if kind is bool else 'a string'}",
                param=f"{path}.{name}",
            )
    schema = value.get("schema")
    if not isinstance(schema, dict):
        raise RequestError(
            f"{path}.schema is {kind_of(schema)}: send a JSON schema, which is an object",
            param=f"{path}.schema",
        )
    text = json.dumps(schema, ensure_ascii=False)
    check_unicode(text, f"{path}.schema")
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise RequestError(
            f"the schema has {len(text):,} characters, more than the {MAX_SCHEMA_CHARACTERS:,} "
            "allowed: shorten it",
            param=f"{path}.schema",
        )
    return text
