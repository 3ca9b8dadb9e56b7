"""Which image URLs are accepted: a data URL is decoded, a web URL is checked but not fetched.

`fetch/client.py` fetches it, and checks every redirect here again.
"""

import re

import httpx

from llava_ray import images
from llava_ray.config import FetchConfig, LimitsConfig
from llava_ray.errors import ImageUrlError
from llava_ray.serve.fetch.ip_policy import Address, is_public, is_within, read_address
from llava_ray.types import ImagePart

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_URL_LENGTH = 4096
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*", re.ASCII)
_REMEDY = "or send the image as a data URL, data:image/png;base64,..."


def read_image_url(url: str, *, limits: LimitsConfig, param: str) -> ImagePart:
    """Return the image of a data URL, or an image part that has yet to be fetched.

    Raises:
        ImageError: see `images.decode_data_url`, also for web URLs if fetching is disabled.
        ImageUrlError: see `check_url`.
    """
    is_web = url.strip().partition(":")[0].lower() in DEFAULT_PORTS
    if is_web and limits.fetch.hosts:
        return ImagePart(b"", param, str(check_url(url.strip(), limits.fetch, param=param)))
    return ImagePart(images.decode_data_url(url, limits=limits, param=param), param)


def check_url(url: str, config: FetchConfig, *, param: str) -> httpx.URL:
    """Return a web URL, without its fragment, if the URL itself is allowed.

    The IP addresses of its host are checked when the connection is made.

    Raises:
        ImageUrlError: host, scheme or port are not allowed, or the URL has credentials in it.
    """
    try:
        if len(url) > MAX_URL_LENGTH:
            raise ValueError(f"it has more than {MAX_URL_LENGTH:,} characters; use a shorter one")
        link = _parse(url)
        _check_port(link, config)
        _check_host(link.raw_host.decode("ascii"), config)
    except ValueError as error:
        message = f"no image is fetched from this address: {error}, {_REMEDY}"
        raise ImageUrlError(message, param=param) from None
    return link.copy_with(fragment=None)


def is_allowed(address: Address, config: FetchConfig) -> bool:
    """Whether a connection to an IP address is allowed."""
    return is_public(address) or is_within(address, config.networks)


def _parse(url: str) -> httpx.URL:
    try:
        link = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"it is not a valid one ({error}); check it") from None
    if link.scheme not in DEFAULT_PORTS:
        raise ValueError(f"its scheme is {link.scheme[:20]!r}; use http or https")
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ValueError("it has a name or password in it; leave them out")
    return link


def _check_port(link: httpx.URL, config: FetchConfig) -> None:
    port = DEFAULT_PORTS[link.scheme] if link.port is None else link.port
    if port not in config.ports:
        raise ValueError(f"its port is {port}; use {' or '.join(map(str, config.ports))}")


def _check_host(host: str, config: FetchConfig) -> None:
    try:
        address = read_address(host)
    except ValueError:
        raise ValueError(
            f"its host, {host[:60]!r}, is an odd way to write an IP address; use a name"
        ) from None
    if address is None and not (len(host) <= 253 and _NAME.fullmatch(host)):
        raise ValueError(
            f"its host, {host[:60]!r}, is not a name; use a full one, like example.org"
        )
    if not any(_matches(host, pattern.lower()) for pattern in config.hosts):
        allowed = ", ".join(config.hosts[:5])
        raise ValueError(f"its host, {host[:60]!r}, is not among those allowed; use {allowed}")
    if address is not None and not is_allowed(address, config):
        raise ValueError("it is not on the public internet; use one that is")


def _matches(host: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return host == pattern
