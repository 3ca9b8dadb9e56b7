"""Access control: API keys, rate limits, deadlines, and retries with an Idempotency-Key.

    RequestLogMiddleware -> AuthMiddleware -> routes
    key (401) -> deadline -> cancel an earlier try -> gateway full (503) -> rate limits (429)

All state belongs to this gateway process, except usage, which `usage_ledger.py` shares.
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

Describe = Callable[[LlavaRayError], ErrorReply]

_ANYBODY = KeyConfig(name="anybody", sha256="0" * 64, is_admin=True)
_CANCEL_TIMEOUT_S = 1.0  # how long a retry waits for the earlier try to end


class AccessControl:
    """The API keys of one gateway, and the requests in flight under each.

    Args:
        config: the application's configuration.
        exchange: reaches the usage ledger of all gateways; None: this is the only gateway.
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
            AuthError: the key is missing or unknown.
        """
        if self._is_open:
            return self._accounts[0]
        key = read_key(headers)
        if not key:
            raise AuthError(
                "this server requires an API key: send the header 'Authorization: Bearer <key>' "
                "(api_key in OpenAI's clients, LLAVA_RAY_API_KEY for llava-ray)"
            )
        found, sha256 = None, hash_key(key)
        for account in self._accounts:  # no early exit: timing must not reveal a match
            if hmac.compare_digest(account.key.sha256, sha256):
                found = account
        if found is None:
            raise AuthError("unknown API key: check it, or ask the operator of this server for one")
        return found

    async def describe_usage(self, caller: str) -> dict[str, Any]:
        """Return the body of `/usage`: the caller's own usage, or all keys' for an admin key."""
        own = [account for account in self._accounts if account.key.name == caller]
        seen = self._accounts if own[0].key.is_admin else own
        return await self._usage.describe(seen)

    async def begin(self, account: Account, context: RequestContext, headers: Headers) -> None:
        """Admit a request; the caller calls `end` when the request has ended.

        Raises:
            RequestError: a header is invalid.
            RateLimitError: the key has reached a limit.
            OverloadedError: the gateway has too many requests in flight.
        """
        context.deadline = Deadline(self._read_timeout(headers))
        context.idempotency_key = headers.get("idempotency-key", "")[:255]
        if context.idempotency_key:
            await self._cancel_earlier_try(account, context)
        if self._num_in_flight >= self.limits.max_in_flight:
            raise OverloadedError(
                f"the gateway has {self.limits.max_in_flight:,} requests in flight, its maximum: "
                "try again in a moment"
            )
        self._usage.sync_soon()  # refusals are counted too
        account.begin()
        self._num_in_flight += 1
        if context.idempotency_key:
            self._tries[account.key.name, context.idempotency_key] = context

    def end(self, account: Account, context: RequestContext) -> None:
        """Record the usage of a finished request and free its Idempotency-Key."""
        self._num_in_flight -= 1
        account.end(context.usage, is_error=bool(context.error))
        self._usage.sync_soon()
        context.is_over.set()
        if self._tries.get((account.key.name, context.idempotency_key)) is context:
            del self._tries[account.key.name, context.idempotency_key]

    async def _cancel_earlier_try(self, account: Account, context: RequestContext) -> None:
        earlier = self._tries.get((account.key.name, context.idempotency_key))
        if earlier is None:
            return
        earlier.deadline.expire_now(
            SupersededError(
                "this request was superseded by a later one with the same Idempotency-Key: read "
                "the response to that one"
            )
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(_CANCEL_TIMEOUT_S):
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
                f"the header X-Request-Timeout is {text[:40]!r}: send a number of seconds, or "
                "leave it out",
                param="X-Request-Timeout",
            )
        return min(timeout_s, self.limits.request_timeout_s)


class AuthMiddleware:
    """ASGI middleware that admits requests to the routes; it runs inside `RequestLogMiddleware`.

    Args:
        app: the routes.
        access: the gateway's access control.
        describe: turns an error into the response format of these routes.
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
        """Run the routes; once the response has begun, `BackendResponse` enforces the deadline."""
        async with context.deadline.enforce() as timer:

            async def send_and_release(message: Message) -> None:
                if message["type"] == "http.response.start":
                    context.deadline.release(timer)
                await send(message)

            await self._app(scope, receive, send_and_release)


class BasicCredentials(NamedTuple):
    """The name and password of HTTP basic authentication, as in http://name:password@host."""

    name: str
    password: str


def read_key(headers: Headers) -> str:
    """Return the API key of a request; "" if it has none.

    The key is a bearer token or the password of basic authentication. LLaVA's own clients cannot
    set headers: they send what their server address contains, http://any:KEY@host:8000.
    """
    if login := read_basic_credentials(headers):
        return login.password.strip()
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def read_basic_credentials(headers: Headers) -> BasicCredentials | None:
    """Return the credentials of HTTP basic authentication (RFC 7617); None without any."""
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, mark, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return BasicCredentials(name, password) if mark else None
