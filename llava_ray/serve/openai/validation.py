"""Error messages for invalid fields: the path of the field, the value seen and what to do.

Also the strict JSON reader of request bodies.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from llava_ray.errors import RequestError

_ALIKE = 0.8  # of difflib's ratio: "temprature" is like "temperature", "id" is not like "n"


def load_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body; raises `RequestError` for anything else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    if not body.strip():
        raise RequestError("the body is empty: send a JSON object")
    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({error}): send a JSON object") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is {kind_of(value)}: send a JSON object")
    return value


def to_request_error(error: ValidationError, body: type[BaseModel]) -> RequestError:
    """Turn pydantic's first error into ours; the field's description is the advice."""
    detail = error.errors(include_url=False)[0]
    path = _path(detail["loc"])
    field = body.model_fields[str(detail["loc"][0])]
    if detail["type"] == "missing":
        return RequestError(f"{path} is missing: {field.description}", param=path)
    problem = detail["msg"][0].lower() + detail["msg"][1:]
    return RequestError(
        f"{path}={show(detail['input'])}: {problem}; {field.description}", param=path
    )


def describe_unknown(name: str, known: Iterable[str]) -> RequestError:
    """Return the error for an unknown field; it suggests a known one that is spelt much alike."""
    close = difflib.get_close_matches(name[:100], sorted(known), n=1, cutoff=_ALIKE)
    hint = f"did you mean {close[0]!r}?" if close else "leave it out"
    return RequestError(f"unknown field {show(name)}: {hint}", param=name[:100])


def is_one_of(value: Any, neutral: Iterable[Any]) -> bool:
    """Whether a value is null or one of `neutral`; unlike in Python, true does not equal 1."""
    return value is None or any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral
    )


def check_unicode(text: str, path: str) -> None:
    """Raise a `RequestError` for a lone surrogate, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start} is half of a surrogate pair: send valid Unicode", param=path
        ) from None


def kind_of(value: Any) -> str:
    """Return the JSON type of a value in words, for an error message."""
    if value is None:
        return "missing or null"
    kinds = {bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def show(value: Any) -> str:
    """Return a value as short JSON, for an error message."""
    if isinstance(value, str):
        value = value[:100]
    try:
        text = json.dumps(value, default=repr)
    except RecursionError:
        return kind_of(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(places: Iterable[int | str]) -> str:
    return "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in places).removeprefix(".")
