"""The address that `/get_worker_address` answers with: this gateway, as its client reaches it."""

from urllib.parse import quote

from fastapi import Request

from llava_ray.serve.login import read_login


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
    if login := read_login(request.headers):
        rest = f"{quote(login.name, safe='')}:{quote(login.password, safe='')}@{rest}"
    return scheme + mark + rest
