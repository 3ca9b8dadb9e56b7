"""What a client shows at the door: the header `Authorization`."""

import base64
from typing import NamedTuple

from starlette.datastructures import Headers


class Login(NamedTuple):
    """A name and password, as they stand in an address before its host."""

    name: str
    password: str


def read_key(headers: Headers) -> str:
    """Return the API key that came with a request; "" if none did.

    It is a bearer token, or the password of a login: LLaVA's own clients send what stands in the
    address that they are given, http://any:KEY@host:8000, and nothing else.
    """
    if login := read_login(headers):
        return login.password.strip()
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def read_login(headers: Headers) -> Login | None:
    """Return the login of HTTP's basic authentication (RFC 7617), if that is what came."""
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, mark, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return Login(name, password) if mark else None
