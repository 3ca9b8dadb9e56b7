"""The wire format of LLaVA's own controller and workers, in both directions, as pure functions.

    bytes -> parse_generate -> PromptRequest;  text so far -> encode_text -> bytes

A client sends a rendered prompt with one `<image>` for each image. A response is a sequence of JSON
objects, each followed by a zero byte, with an error code and the prompt plus the whole answer so
far. The routes are in `gateway/llava_routes.py`.
"""

import json
from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from llava_ray.config import LimitsConfig
from llava_ray.errors import (
    LlavaRayError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnreachableError,
)
from llava_ray.images import decode_base64
from llava_ray.serve.openai.errors import ErrorReply, describe_error
from llava_ray.serve.openai.validation import load_json, show
from llava_ray.types import ImagePart, PromptRequest, Sampling

END = b"\0"

OK = 0
FAILED = 1
"""The worker failed."""
NO_MODEL = 2
"""No worker has that model."""
UNREACHABLE = 3
"""The worker cannot be reached or is overloaded."""

_GREEDY_BELOW = 0.001


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is not valid Unicode") from None
    return text


_Text = Annotated[str, AfterValidator(_check_text)]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class Body(BaseModel):
    """A JSON body of the protocol; unknown fields are ignored, as in LLaVA's own code."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class ModelBody(Body):
    """`/get_worker_address`"""

    model: _Name = Field(description="name one of those that /list_models lists")


class GenerateBody(ModelBody):
    """`/worker_generate_stream`; the defaults are those of LLaVA's worker."""

    prompt: _Text = Field(description="the rendered prompt, with <image> for each image")
    images: list[_Text] | None = Field(None, description="a list of images in base64")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, ge=0, le=1, description="a number from 0 to 1")
    max_new_tokens: int = Field(256, ge=1, le=2**31, description="a whole number from 1")
    stop: _Text | list[_Text] | None = Field(None, description="a text, or a list of texts")


class StatusBody(Body):
    """What `/worker_get_status` answers."""

    model_names: list[_Name] = Field(max_length=100, description="a list of names")
    speed: float = Field(gt=0, le=1e6, description="a number over 0")
    queue_length: int = Field(ge=0, le=10**9, description="a whole number from 0")


class AnswerBody(Body):
    """One object of what `/worker_generate_stream` answers."""

    text: _Text
    error_code: int = OK


class RegisterBody(Body):
    """`/register_worker`"""

    worker_name: _Name = Field(description="the worker's address, http://host:port")
    check_heart_beat: bool = Field(description="true or false")
    worker_status: StatusBody | None = Field(None, description="what /worker_get_status answers")


class HeartBeatBody(Body):
    """`/receive_heart_beat`"""

    worker_name: _Name = Field(description="the worker's address, http://host:port")
    queue_length: int = Field(ge=0, le=10**9, description="a whole number from 0")


B = TypeVar("B", bound=Body)


def parse(kind: type[B], body: bytes) -> B:
    """Return the checked fields of a body.

    Raises:
        RequestError: the body is not a JSON object, or a field is missing or invalid.
    """
    try:
        return kind.model_validate(load_json(body))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        path = ".".join(str(place) for place in detail["loc"])
        remedy = kind.model_fields[str(detail["loc"][0])].description
        if detail["type"] == "missing":
            raise RequestError(f"{path} is missing: {remedy}", param=path) from None
        problem = detail["msg"][0].lower() + detail["msg"][1:]
        raise RequestError(
            f"{path}={show(detail['input'])}: {problem}; {remedy}", param=path
        ) from None


def parse_generate(body: bytes, *, limits: LimitsConfig, request_id: str) -> PromptRequest:
    """Parse the body of `/worker_generate_stream`.

    Stop texts that are only white space are ignored, as LLaVA's workers do: `test_message` sends
    one with every request and expects more than a word.

    Raises:
        RequestError: the request is invalid; the message says why and what to do.
    """
    fields = parse(GenerateBody, body)
    encoded = fields.images or []
    if len(encoded) > limits.max_images:
        raise RequestError(
            f"{len(encoded)} images, more than the {limits.max_images} allowed: send fewer",
            param="images",
        )
    images = tuple(
        ImagePart(decode_base64(text, limits=limits, param=path), path)
        for path, text in ((f"images[{i}]", text) for i, text in enumerate(encoded))
    )
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    is_greedy = fields.temperature <= _GREEDY_BELOW or fields.top_p == 0
    sampling = Sampling(
        max_tokens=min(fields.max_new_tokens, limits.max_tokens or fields.max_new_tokens),
        temperature=0.0 if is_greedy else fields.temperature,
        top_p=fields.top_p or 1.0,
        stop=tuple(text for text in stop if text.strip()),
        may_cut=True,  # as LLaVA's workers do
    )
    return PromptRequest(request_id, fields.model, fields.prompt, images, sampling)


def encode_text(text: str, code: int = OK) -> bytes:
    """Encode one object of a response: prompt and answer so far, or an error message."""
    return json.dumps({"text": text, "error_code": code}).encode() + END


def encode_error(error: LlavaRayError) -> bytes:
    """Encode the object for an error."""
    return encode_text(error.message, find_code(error))


def describe_llava_error(error: LlavaRayError) -> ErrorReply:
    """Return the HTTP response for a request that is refused before it is parsed."""
    reply = describe_error(error)
    return reply._replace(body={"text": error.message, "error_code": find_code(error)})


def find_code(error: LlavaRayError) -> int:
    """Return the protocol's error code for an error of ours."""
    match error:
        case ModelNotFoundError():
            return NO_MODEL
        case OverloadedError() | UnreachableError():
            return UNREACHABLE
        case _:
            return FAILED
