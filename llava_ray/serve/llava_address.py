"""The address that `/get_worker_address` answers with: this gateway, as its client reaches it."""

import base64
from urllib.parse import quote

from fastapi import Request


def find_address(request: Request, configured: str) -> str:
    """Return where the client of a request reaches this gateway, as far as can be known.

    That is the configured address if there is one, else the one that it asked, which a proxy in
    front may have noted in `X-Forwarded-Host` and `X-Forwarded-Proto`. A name and password that
    the client sent are in it, since LLaVA's clients can only send those of the address that they
    call.
    """
    url = request.base_url
    host = request.headers.get("x-forwarded-host", url.netloc).split(",")[0].strip()
    scheme = request.headers.get("x-forwarded-proto", url.scheme).split(",")[0].strip()
    address = configured or f"{scheme}://{host}{url.path.rstrip('/')}"
    scheme, mark, rest = address.partition("://")
    return scheme + mark + _find_login(request) + rest


def _find_login(request: Request) -> str:
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return ""
    try:
        name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return ""
    return f"{quote(name, safe='')}:{quote(password, safe='')}@"
