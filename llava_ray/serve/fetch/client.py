"""Fetches the images that a request names by URL, without trusting the URLs.

    ImagePart with a url -> check_url -> resolve, check every IP address, connect to a checked one
    -> redirect: start again | bytes, limited in size and time

A name is resolved once per connection and the connection goes to the checked address, so DNS
rebinding has no effect; TLS still verifies the name. Nothing is decompressed, no cookies or
credentials are sent, and proxies in the environment are ignored.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ssl import SSLContext
from typing import Any
from weakref import WeakValueDictionary

import httpcore
import httpx

import llava_ray
from llava_ray.config import FetchConfig, LimitsConfig
from llava_ray.errors import FetchError, ImageUrlError
from llava_ray.serve.fetch.ip_policy import Address, parse_address, read_address
from llava_ray.serve.fetch.url_policy import DEFAULT_PORTS, check_url, is_allowed
from llava_ray.types import ChatRequest, ImagePart

Resolve = Callable[[str, int], Awaitable[list[str]]]

_CONNECT_TIMEOUT_S = 3.0  # per IP address
_NUM_ADDRESSES = 4  # how many IP addresses of a host are tried
_REDIRECTS = (301, 302, 303, 307, 308)
_OTHER_MEDIA_TYPES = (
    *("text/", "audio/", "video/", "application/json", "application/xml", "application/xhtml"),
    *("application/javascript", "application/pdf"),
)
"""Beginnings of types that no image has; any other declared type is only a hint."""
_REMEDY = "check the address, or send the image as a data URL"


class Fetcher:
    """Fetches images for one gateway; a slow web server only delays requests that use it.

    Args:
        limits: bytes allowed, and `limits.fetch`.
        resolve: returns the IP addresses of a host and port; default: the system's resolver.
        ssl_context: the trusted certificates; default: the usual authorities.
    """

    def __init__(
        self,
        limits: LimitsConfig,
        *,
        resolve: Resolve | None = None,
        ssl_context: SSLContext | None = None,
    ) -> None:
        self._limits, self._config = limits, limits.fetch
        self._slots = asyncio.Semaphore(self._config.max_at_once)
        self._slots_by_host: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        if ssl_context is None and self._config.hosts:
            ssl_context = httpx.create_ssl_context()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=self._config.max_at_once,
            max_keepalive_connections=0,
            network_backend=_CheckedNetwork(self._config, resolve or _Resolver().resolve),
        )

    async def fetch_images(self, request: ChatRequest) -> ChatRequest:
        """Return the request with the bytes of all images filled in; each URL is fetched once.

        Raises:
            ImageUrlError: a URL, or one that it redirects to, is not allowed.
            FetchError: a URL returned no image, one that is too large, or none in time.
        """
        links = {part.url: part for part in _parts(request) if part.url and not part.data}
        if not links:
            return request
        budget = _ByteBudget(self._limits.max_body_bytes)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    url: group.create_task(self._fetch(part, budget)) for url, part in links.items()
                }
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return _put_in(request, {url: task.result() for url, task in tasks.items()})

    async def _fetch(self, part: ImagePart, budget: "_ByteBudget") -> bytes:
        """Return the bytes of one image."""
        link = httpx.URL(part.url)
        places = self._slots_by_host.setdefault(
            link.host, asyncio.Semaphore(self._config.max_per_host)
        )
        try:
            async with asyncio.timeout(self._config.timeout_s), places, self._slots:
                return await self._follow(link, part.param, budget)
        except TimeoutError:
            problem = f"took longer than the {self._config.timeout_s:g} s allowed"
        except _NotAllowedError:
            raise ImageUrlError(
                f"no image is fetched from {link.host}: its IP address is not on "
                "the public internet; send the image as a data URL",
                param=part.param,
            ) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError):
            problem = "could not be reached, or broke off"
        except _UnusableError as error:
            problem = str(error)
        raise FetchError(f"{link.host} {problem}: {_REMEDY}", param=part.param)

    async def _follow(self, link: httpx.URL, param: str, budget: "_ByteBudget") -> bytes:
        for _ in range(self._config.max_redirects + 1):
            async with self._pool.stream("GET", _target(link), headers=_headers(link)) as answer:
                headers = {key.lower(): value.decode("latin-1") for key, value in answer.headers}
                if answer.status not in _REDIRECTS:
                    _check_head(answer.status, headers)
                    return await self._read(answer, headers.get(b"content-length", ""), budget)
            try:
                link = link.join(headers[b"location"])
            except (KeyError, httpx.InvalidURL):
                raise _UnusableError("redirects to nothing that is an address") from None
            link = check_url(str(link), self._config, param=param)
        raise _UnusableError(f"redirects more often than the {self._config.max_redirects} allowed")

    async def _read(self, answer: httpcore.Response, length: str, budget: "_ByteBudget") -> bytes:
        max_bytes = self._limits.max_image_bytes
        too_long = _UnusableError(f"sent more than the {max_bytes:,} bytes allowed for an image")
        if length.isdecimal() and int(length) > max_bytes:
            raise too_long
        data = bytearray()
        async for piece in answer.aiter_stream():
            data += piece
            budget.take(len(piece))
            if len(data) > max_bytes:
                raise too_long
        return bytes(data)


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to a host only if all its IP addresses are allowed, and only to one of these."""

    def __init__(self, config: FetchConfig, resolve: Resolve) -> None:
        self._config, self._resolve = config, resolve
        self._network: Any = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._find_addresses(host, port)
        if not all(is_allowed(address, self._config) for address in addresses):
            raise _NotAllowedError
        error: Exception = httpcore.ConnectError("no address")
        for address in addresses[:_NUM_ADDRESSES]:
            try:
                return await self._network.connect_tcp(
                    str(address), port, _CONNECT_TIMEOUT_S, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failure:
                error = failure
        raise error

    async def _find_addresses(self, host: str, port: int) -> list[Address]:
        if address := read_address(host):
            return [address]
        return [parse_address(text) for text in await self._resolve(host, port)]


class _Resolver:
    """The system's resolver, in its own threads: a slow name server delays nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="resolve")

    async def resolve(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(place[4][0]) for place in found]


class _ByteBudget:
    """Bounds the bytes of all images of one request together."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = self._num_left = num_bytes

    def take(self, num_bytes: int) -> None:
        self._num_left -= num_bytes
        if self._num_left < 0:
            raise _UnusableError(
                f"and the others sent more than the {self._num_bytes:,} bytes allowed together"
            )


class _NotAllowedError(Exception):
    """A host has an IP address that is not allowed."""


class _UnusableError(Exception):
    """A web server's response cannot be used; the message continues "<host> ..."."""


def _check_head(status: int, headers: dict[bytes, str]) -> None:
    if status != 200:
        raise _UnusableError(f"answered {status} instead of sending an image")
    media_type = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if media_type.startswith(_OTHER_MEDIA_TYPES):
        raise _UnusableError(f"sent {media_type[:60]!r}, which is not an image")
    if headers.get(b"content-encoding", "identity").lower() not in ("identity", ""):
        raise _UnusableError("sent a compressed answer, which nobody asked for")


def _target(link: httpx.URL) -> httpcore.URL:
    port = DEFAULT_PORTS[link.scheme] if link.port is None else link.port
    return httpcore.URL(scheme=link.raw_scheme, host=link.raw_host, port=port, target=link.raw_path)


def _headers(link: httpx.URL) -> Mapping[bytes | str, bytes | str]:
    return {
        "Host": link.netloc.decode("ascii"),
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "User-Agent": f"llava-ray/{llava_ray.__version__}",
    }


def _parts(request: ChatRequest) -> Iterable[ImagePart]:
    for message in request.messages:
        for part in message.parts:
            if isinstance(part, ImagePart):
                yield part


def _put_in(request: ChatRequest, found: dict[str, bytes]) -> ChatRequest:
    messages = tuple(
        replace(
            message,
            parts=tuple(
                replace(part, data=found.get(part.url, part.data))
                if isinstance(part, ImagePart)
                else part
                for part in message.parts
            ),
        )
        for message in request.messages
    )
    return replace(request, messages=messages)
