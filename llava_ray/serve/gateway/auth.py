"""Who may come in, and how much at once: API keys, budgets, deadlines, one run for each retry.

    RequestLogMiddleware -> AuthMiddleware -> routes
    key -> account (429) -> place of an earlier try taken -> room in the gateway (503) -> deadline

Everything here is one gateway's own, but what keys have used: see `ledger.py`.
"""

import asyncio
import base64
import hmac
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_ray.config import KeyConfig, ServeConfig, hash_key
from llava_ray.errors import (
    AuthError,
    LlavaRayError,
    OverloadedError,
    RequestError,
    SupersededError,
)
from llava_ray.serve.deadline import Deadline
from llava_ray.serve.gateway.rate_limit import Account
from llava_ray.serve.gateway.request_log import send_reply
from llava_ray.serve.gateway.usage_ledger import ExchangeCounts, SharedUsage
from llava_ray.serve.openai.errors import ErrorReply, describe_error
from llava_ray.serve.request_context import RequestContext


class BasicCredentials(NamedTuple):
    """A name and password, as they stand in an address before its host."""

    name: str
    password: str


def read_key(headers: Headers) -> str:
    """Return the API key that came with a request; "" if none did.

    It is a bearer token, or the password of a login: LLaVA's own clients send what stands in the
    address that they are given, http://any:KEY@host:8000, and nothing else.
    """
    if login := read_basic_credentials(headers):
        return login.password.strip()
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def read_basic_credentials(headers: Headers) -> BasicCredentials | None:
    """Return the login of HTTP's basic authentication (RFC 7617), if that is what came."""
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, mark, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return BasicCredentials(name, password) if mark else None


Describe = Callable[[LlavaRayError], ErrorReply]

_ANYBODY = KeyConfig(name="anybody", sha256="0" * 64, is_admin=True)
_GIVING_WAY_S = 1.0  # for the first try to be gone, when the second one comes


class AccessControl:
    """Knows the keys, and what is going on under each.

    Args:
        config: the application's.
        exchange: reaches the ledger that all gateways share; None: there is this one alone.
    """

    def __init__(self, config: ServeConfig, exchange: ExchangeCounts | None = None) -> None:
        self.limits = config.limits
        self._is_open = not config.api_keys
        self._accounts = [Account(key) for key in config.api_keys or [_ANYBODY]]
        self._usage = SharedUsage(self._accounts, exchange)
        self._num_in_flight = 0
        self._tries: dict[tuple[str, str], RequestContext] = {}

    def find_account(self, headers: Headers) -> Account:
        """Return the account of the key in the header `Authorization`, see `read_key`.

        Raises:
            AuthError: there is none, or it is not known.
        """
        if self._is_open:
            return self._accounts[0]
        key = read_key(headers)
        if not key:
            raise AuthError(
                "this server wants an API key: send the header 'Authorization: Bearer <key>' "
                "(api_key in OpenAI's clients, LLAVA_RAY_API_KEY for llava-ray)"
            )
        found, sha256 = None, hash_key(key)
        for account in self._accounts:  # all of them, so that time tells nothing
            if hmac.compare_digest(account.key.sha256, sha256):
                found = account
        if found is None:
            raise AuthError(
                "the API key is not known here: check it, or ask whoever runs this server for one"
            )
        return found

    async def describe_usage(self, caller: str) -> dict[str, Any]:
        """Return the body of `/usage` for the key of that name: its own, or an admin's all."""
        own = [account for account in self._accounts if account.key.name == caller]
        seen = self._accounts if own[0].key.is_admin else own
        return await self._usage.describe(seen)

    async def begin(self, account: Account, context: RequestContext, headers: Headers) -> None:
        """Let a request in; `end` is called when it is over.

        Raises:
            RequestError: a header is not what it should be.
            RateLimitError: the key has used up what it may.
            OverloadedError: the gateway has too much to do.
        """
        context.deadline = Deadline(self._read_timeout(headers))
        context.idempotency_key = headers.get("idempotency-key", "")[:255]
        if context.idempotency_key:
            await self._take_the_place(account, context)
        if self._num_in_flight >= self.limits.max_in_flight:
            raise OverloadedError(
                f"the gateway has {self.limits.max_in_flight:,} requests to do, as many as it may: "
                "try again in a moment"
            )
        self._usage.sync_soon()  # a refusal counts too
        account.begin()
        self._num_in_flight += 1
        if context.idempotency_key:
            self._tries[account.key.name, context.idempotency_key] = context

    def end(self, account: Account, context: RequestContext) -> None:
        """Count what a request used; a later one may use its Idempotency-Key."""
        self._num_in_flight -= 1
        account.end(context.usage, is_error=bool(context.error))
        self._usage.sync_soon()
        context.is_over.set()
        if self._tries.get((account.key.name, context.idempotency_key)) is context:
            del self._tries[account.key.name, context.idempotency_key]

    async def _take_the_place(self, account: Account, context: RequestContext) -> None:
        earlier = self._tries.get((account.key.name, context.idempotency_key))
        if earlier is None:
            return
        earlier.deadline.expire_now(
            SupersededError(
                "a second request with the same Idempotency-Key came and took the place of this "
                "one: read its answer instead"
            )
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(_GIVING_WAY_S):
                await earlier.is_over.wait()

    def _read_timeout(self, headers: Headers) -> float:
        text = headers.get("x-request-timeout")
        if text is None:
            return self.limits.request_timeout_s
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not timeout_s > 0:
            raise RequestError(
                f"the header X-Request-Timeout is {text[:40]!r}: send seconds, or leave it out",
                param="X-Request-Timeout",
            )
        return min(timeout_s, self.limits.request_timeout_s)


class AuthMiddleware:
    """Stands before the routes that take an API key, and behind `RequestLogMiddleware`.

    Args:
        app: the routes.
        access: the gateway's.
        describe: how errors are written to the clients of these routes.
    """

    def __init__(
        self, app: ASGIApp, access: AccessControl, describe: Describe = describe_error
    ) -> None:
        self._app, self._access, self._describe = app, access, describe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        context: RequestContext = scope["state"]["context"]
        extra: dict[str, str] = {}

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(extra)
            await send(message)

        try:
            account = self._access.find_account(Headers(scope=scope))
            context.key = account.key.name
            if scope["method"] != "POST":
                return await self._app(scope, receive, send)
            try:
                await self._access.begin(account, context, Headers(scope=scope))
            finally:
                extra |= account.describe_limits()
            try:
                await self._run(context, scope, receive, send_with_limits)
            except LlavaRayError as error:
                context.error = error.code
                raise
            finally:
                self._access.end(account, context)
        except LlavaRayError as error:
            context.error = error.code
            await send_reply(self._describe(error), send_with_limits)

    async def _run(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run the routes; once they have begun to answer, `BackendResponse` heeds the deadline."""
        async with context.deadline.enforce() as timer:

            async def send_and_release(message: Message) -> None:
                if message["type"] == "http.response.start":
                    context.deadline.release(timer)
                await send(message)

            await self._app(scope, receive, send_and_release)
