"""The address of `llava-ray serve`: whether it is free, and how to tell it. It needs no Ray."""

import errno
import socket

from llava_ray.errors import ConfigError

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Addresses that stand for all of a machine, and the one by which it reaches itself."""


def check_port(host: str, port: int) -> None:
    """Raise a ConfigError if a server cannot listen at an address.

    Ray's proxies share a port in silence, so this asks for the port alone, and before Ray starts.
    """
    try:
        places = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError(
            f"--host {host} is no address of this machine ({error}): use 127.0.0.1, or 0.0.0.0 to "
            "let other machines in"
        ) from None
    for family, kind, protocol, _, address in places:
        with socket.socket(family, kind, protocol) as listener:
            # A port whose last connections have only just ended is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(address)
                listener.listen(1)
            except OSError as error:
                raise ConfigError(_explain(host, port, error)) from None


def _explain(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host} is taken: choose another with --port, or end the server that "
            "listens there (`serve shutdown -y` ends Ray Serve)"
        )
    if error.errno == errno.EACCES:
        return f"port {port} is reserved for the system: choose one from 1024 on with --port"
    return (
        f"no server can listen at {host}:{port} ({error.strerror}): use 127.0.0.1, or 0.0.0.0 to "
        "let other machines in"
    )


def find_open_door(host: str, *, has_keys: bool) -> str:
    """Return a warning if other machines may use a server without an API key; else ""."""
    is_local = host == "localhost" or host.startswith("127.") or host == "::1"
    if is_local or has_keys:
        return ""
    return (
        f"--host {host} lets other machines in, and everyone who reaches this one may use the "
        "models: set api_keys, and see the page on security in the documentation"
    )


def describe_address(host: str, port: int, *, has_page: bool) -> str:
    """Return a sentence that says where the API is, and the page if there is one."""
    name = _ANYWHERE.get(host, host)
    root = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    told = (
        f"the page is at {root} and the API at {root}/v1"
        if has_page
        else (f"the API is at {root}/v1")
    )
    return f"{told}, on all addresses of this machine" if host in _ANYWHERE else told
