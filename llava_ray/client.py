"""A small client of the gateway, for the page and the command line.

    ChatRequest -> JSON of the OpenAI API -> HTTP -> server-sent events -> Chunk

It takes and returns the same records as `engine.chat`, so callers can use either. It works with any
server that has the OpenAI API. Errors of the server are raised as this package's classes.
"""

import json
import os
from collections.abc import AsyncGenerator, Iterator
from dataclasses import asdict
from io import BytesIO
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from llava_ray import images
from llava_ray.config import CLIENT_KEY_VARIABLE, LimitsConfig
from llava_ray.errors import (
    AuthError,
    EngineError,
    ImageError,
    LlavaRayError,
    OverloadedError,
    RequestError,
    RequestTooLargeError,
    UserError,
)
from llava_ray.types import ChatRequest, Chunk, ImagePart, Message, Sampling, TextPart

DEFAULT_URL = "http://localhost:8000"
LONGEST_SIDE = 1344  # pixels, as in LLaVA's page; no model of this family sees more
_SEND_AS_IS_BYTES = 4 << 20
_PHOTOS = LimitsConfig(max_image_bytes=64 << 20, max_image_pixels=120_000_000)


def shrink_image(data: bytes, *, name: str) -> bytes:
    """Return an encoded image that is small enough to send.

    A file with sides of at most `LONGEST_SIDE` pixels and at most 4 MiB is returned unchanged. Any
    other image is scaled down, keeping its aspect ratio, and encoded as JPEG.

    Raises:
        ImageError: the data is not an image that can be read; the message begins with `name`.
    """
    try:
        image = images.decode(data, limits=_PHOTOS)
    except ImageError as error:
        raise ImageError(f"{name}: {error.message}") from error
    if max(image.size) <= LONGEST_SIDE and len(data) <= _SEND_AS_IS_BYTES:
        return data
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    encoded = BytesIO()
    image.save(encoded, format="JPEG", quality=92)
    return encoded.getvalue()


class Client:
    """Talks to one gateway; an asynchronous context manager.

    Args:
        base_url: the gateway's address, including its route prefix if it has one.
        timeout_s: longest wait for the next bytes of a response.
        api_key: sent with each request; by default the environment variable `LLAVA_RAY_API_KEY`.
    """

    def __init__(
        self, base_url: str = DEFAULT_URL, *, timeout_s: float = 300, api_key: str | None = None
    ) -> None:
        key = os.environ.get(CLIENT_KEY_VARIABLE) if api_key is None else api_key
        if "://" not in base_url:
            base_url = f"http://{base_url}"
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(
                f"not the address of a server: {base_url!r}; give one like {DEFAULT_URL}"
            )
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=5),
            # Creating a TLS context takes longer than a request to a server on this machine.
            verify=address.scheme == "https",
            trust_env=address.hostname not in ("localhost", "127.0.0.1", "::1"),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def is_up(self) -> bool:
        """Return whether a gateway answers at the address."""
        try:
            answer = await self._http.get("/healthz", timeout=3)
        except httpx.HTTPError:
            return False
        return answer.status_code < 500

    async def list_models(self) -> list[str]:
        """Return the names of the models served there, sorted; raises as `describe_models` does."""
        return sorted(model["id"] for model in await self.describe_models())

    async def describe_models(self) -> list[dict[str, Any]]:
        """Return the models served there, as the server describes them: `id`, `owned_by`, ...

        Raises:
            UserError: nothing answers at the address.
            LlavaRayError: the server answered with an error.
        """
        try:
            answer = await self._http.get("/v1/models", timeout=10)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise _error_of(answer.content, answer)
        try:
            return [{**model, "id": str(model["id"])} for model in answer.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.base_url}/v1/models does not answer as the OpenAI API does "
                f"({type(error).__name__}: {error}); is it the address of such a server?"
            ) from error

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk]:
        """Yield the answer in chunks; closing the iterator aborts the request at the server.

        Only the last chunk has a `finish_reason` and token counts; the others' counts are 0. An
        error's message ends with the request id under which the server logged it.

        Raises:
            UserError: nothing answers at the address.
            LlavaRayError: the server refused the request or failed during the answer; it has the
                class that was raised there.
        """
        headers = {"X-Request-Id": request.request_id} if request.request_id else {}
        call = self._http.stream(
            "POST", "/v1/chat/completions", json=_body(request), headers=headers
        )
        finish_reason, usage, answer, fingerprint = None, {}, None, ""
        try:
            async with call as answer:
                if answer.is_error:
                    raise _error_of(await answer.aread(), answer)
                async for line in answer.aiter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    event = json.loads(line[len("data:") :])
                    if "error" in event:
                        raise _error_of(line[len("data:") :].encode(), answer)
                    usage = event.get("usage") or usage
                    fingerprint = event.get("system_fingerprint") or fingerprint
                    for choice in event.get("choices") or ():
                        finish_reason = choice.get("finish_reason") or finish_reason
                        if text := (choice.get("delta") or {}).get("content"):
                            yield Chunk(text, None, 0, 0, 0)
        except (ValueError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self.base_url} does not stream as the OpenAI API does "
                f"({type(error).__name__}: {error})" + _request_id(answer)
            ) from error
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.HTTPError as error:
            raise EngineError(
                f"the connection to {self.base_url} broke ({_say(error)}); try again"
                + _request_id(answer)
            ) from error
        if finish_reason is None:
            raise EngineError(
                "the server ended the answer too early; try again" + _request_id(answer)
            )
        details = usage.get("prompt_tokens_details") or {}
        yield Chunk(
            "",
            finish_reason,
            usage.get("completion_tokens", 0),
            usage.get("prompt_tokens", 0),
            details.get("image_tokens", 0),
            fingerprint=fingerprint,
        )

    def _unreachable(self, error: httpx.HTTPError) -> UserError:
        return UserError(
            f"no server answers at {self.base_url} ({_say(error)}); start one with "
            "`llava-ray serve`, or give the right address"
        )


def _body(request: ChatRequest) -> dict[str, Any]:
    return {
        "model": request.model,
        "messages": [_message(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **_sampling(request.sampling),
    }


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Return the fields that differ from the defaults; a server need not know the others."""
    names = {"temperature", "top_p"}
    names |= {
        name for name, value in asdict(Sampling()).items() if getattr(sampling, name) != value
    }
    fields = {name: getattr(sampling, name) for name in sorted(names)}
    if "logit_bias" in fields:
        fields["logit_bias"] = {str(id_): bias for id_, bias in sampling.logit_bias}
    if "num_logprobs" in fields:
        fields |= {"logprobs": True, "top_logprobs": fields.pop("num_logprobs")}
    if "json_schema" in fields:
        schema = {"name": "answer", "schema": json.loads(fields.pop("json_schema"))}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _message(message: Message) -> dict[str, Any]:
    if all(isinstance(part, TextPart) for part in message.parts):
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        return {"role": message.role, "content": text}
    return {"role": message.role, "content": [_part(part) for part in message.parts]}


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": images.to_data_url(part.data)}}


def _error_of(body: bytes, answer: httpx.Response) -> LlavaRayError:
    """Return the error that a response describes, in the class that the server raised."""
    try:
        told = json.loads(body)["error"]
        message, code, param = told["message"], told.get("code"), told.get("param")
    except (ValueError, TypeError, KeyError):
        text = body.decode(errors="replace").strip()[:300] or answer.reason_phrase
        message, code, param = f"the server answered {answer.status_code}: {text}", None, None
    kinds = {kind.code: kind for kind in _classes(LlavaRayError)}
    kind = kinds.get(code or "") or _class_for(answer.status_code)
    return kind(message + _request_id(answer), param=param)


def _class_for(status: int) -> type[LlavaRayError]:
    if status in (429, 503):
        return OverloadedError
    if status == 401:
        return AuthError
    if status == 413:
        return RequestTooLargeError
    return RequestError if 400 <= status < 500 else EngineError


def _classes(root: type[LlavaRayError]) -> Iterator[type[LlavaRayError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


def _request_id(answer: httpx.Response | None) -> str:
    name = answer.headers.get("x-request-id") if answer else None
    return f" [request {name}]" if name else ""


def _say(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
