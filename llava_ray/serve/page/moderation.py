"""Asks an endpoint with OpenAI's moderation API whether a question may be sent to a model.

    Message -> concurrent requests, one for each part (text or image) -> nothing, or RefusedError

The API is POST {url}/moderations with `model` and `input`, a list with one part as in chat. The
response has `results`, each with `flagged` and `categories`.
"""

import asyncio
from typing import Any

import httpx

from llava_ray import images
from llava_ray.config import ModerationConfig
from llava_ray.errors import OverloadedError, RefusedError
from llava_ray.serve import log
from llava_ray.types import ImagePart, Message, TextPart


class Moderator:
    """Checks questions at one endpoint."""

    def __init__(self, config: ModerationConfig) -> None:
        self._config = config

    async def check(self, message: Message) -> None:
        """Raise unless the message may be sent to a model.

        Raises:
            RefusedError: the message was flagged.
            OverloadedError: the endpoint failed, and the configuration refuses messages then.
        """
        if not self._config.url:
            return None
        key = self._config.key.get_secret_value()
        async with httpx.AsyncClient(
            base_url=self._config.url.rstrip("/"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self._config.timeout_s,
            verify=not self._config.url.startswith("http:"),  # loading certificates is slow
            trust_env=httpx.URL(self._config.url).host not in ("localhost", "127.0.0.1", "::1"),
        ) as http:
            asked = [self._ask(http, part) for part in message.parts]
            try:
                told = await asyncio.gather(*asked)
            except (httpx.HTTPError, ValueError, TypeError, LookupError) as error:
                return self._go_without(error)
        if reasons := sorted(set().union(*told)):
            raise RefusedError(
                f"this question was not sent: the moderation service flagged it "
                f"({', '.join(reasons)}). Please rephrase it."
            )
        return None

    async def _ask(self, http: httpx.AsyncClient, part: TextPart | ImagePart) -> set[str]:
        """Return the reasons why a part is flagged; empty if it is not."""
        body = {"model": self._config.model, "input": [_describe(part)]}
        answer = await http.post("/moderations", json=body)
        results = answer.raise_for_status().json()["results"]
        return set().union(*(_name_reasons(result) for result in results))

    def _go_without(self, error: Exception) -> None:
        log.logger.warning(f"the moderation service failed: {type(error).__name__}: {error}")
        if not self._config.allow_on_failure:
            raise OverloadedError(
                "this question was not sent: the moderation service does not respond, and nothing "
                "is sent unchecked; try again in a moment"
            ) from error


def _describe(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": images.to_data_url(part.data)}}


def _name_reasons(result: dict[str, Any]) -> set[str]:
    if not result["flagged"]:
        return set()
    names = {name for name, is_so in (result.get("categories") or {}).items() if is_so}
    return names or {"flagged"}
