"""Where `llava-ray serve` listens, what it says of it, and the name that it gives a model."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llava_ray.config import ModelConfig, ServeConfig
from llava_ray.errors import ConfigError
from llava_ray.serve.address import check_port, describe_address, find_open_door


@pytest.fixture(params=["127.0.0.1", "0.0.0.0"])
def taken(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port on which a server listens that would share it, as Ray Serve's proxies would."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((request.param, 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_is_taken_is_an_error_and_a_free_one_is_not(host: str, taken: int) -> None:
    with pytest.raises(ConfigError, match=f"port {taken} of {host} is taken: choose another"):
        check_port(host, taken)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    check_port(host, free)


def test_an_address_that_is_not_this_machines_is_an_error() -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(ConfigError, match="to let other machines in"):
            check_port(host, 8000)


def test_the_command_says_so_before_ray_starts(taken: int) -> None:
    words = ["serve", "--engine", "echo", "--port", str(taken)]
    command = [sys.executable, "-m", "llava_ray.cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert f"port {taken} of 127.0.0.1 is taken" in " ".join(ended.stderr.split())
    assert "starting Ray" not in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("host", "port", "has_page", "told"),
    [
        (
            "127.0.0.1",
            8000,
            True,
            "the page is at http://127.0.0.1:8000 and the API at http://127.0.0.1:8000/v1",
        ),
        ("127.0.0.1", 9000, False, "the API is at http://127.0.0.1:9000/v1"),
        (
            "0.0.0.0",
            8000,
            False,
            "the API is at http://127.0.0.1:8000/v1, on all addresses of this machine",
        ),
        ("::1", 8000, False, "the API is at http://[::1]:8000/v1"),
    ],
)
def test_the_address_is_told_in_a_sentence(host: str, port: int, has_page: bool, told: str) -> None:
    assert describe_address(host, port, has_page=has_page) == told


def test_an_open_door_is_told() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.7"):
        assert "set api_keys" in find_open_door(host, has_keys=False)
        assert not find_open_door(host, has_keys=True)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.1.1"):
        assert not find_open_door(host, has_keys=False)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("demo", "llava-ray-demo"),
        ("outputs/my-run/export", "my-run"),
        ("outputs/my-run/export/", "my-run"),
        ("s3://bucket/runs/seven/export", "seven"),
        ("export", "export"),
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b-hf"),
    ],
)
def test_a_model_is_named_after_its_folder_or_its_run(path: str, name: str) -> None:
    assert ModelConfig(path=path).name == name
    assert ServeConfig(model=path).models[0].name == name
    assert ServeConfig(model=path, name="mine").models[0].name == "mine"
