"""`response_format` of a chat: the JSON schema to which the answer is held.

Source: https://platform.openai.com/docs/guides/structured-outputs
"""

import json
from typing import Any

from llava_ray.errors import RequestError
from llava_ray.serve.openai_checks import check_unicode, kind_of, refuse_unknown, show

MAX_SCHEMA_CHARACTERS = 100_000
_ANY_OBJECT = {"type": "object"}


def read_format(value: dict[str, Any] | None) -> str | None:
    """Return the JSON schema that a response format asks for, as text; None: any text will do.

    Whether the schema can be held to, the model's replica says.

    Raises:
        RequestError: it is not one of the three formats.
    """
    if value is None:
        return None
    match value.get("type"):
        case "text":
            refuse_unknown(value, {"type"}, "response_format")
            return None
        case "json_object":
            refuse_unknown(value, {"type"}, "response_format")
            return json.dumps(_ANY_OBJECT)
        case "json_schema":
            refuse_unknown(value, {"type", "json_schema"}, "response_format")
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
    refuse_unknown(value, {"name", "description", "schema", "strict"}, path)
    for name, kind in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(value.get(name), kind | None):
            raise RequestError(
                f"{path}.{name} is {kind_of(value[name])}: "
                f"{'true or false' if kind is bool else 'a text'}",
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
