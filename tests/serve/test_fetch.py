"""Images from the web: what is fetched, and how every way to another address is refused."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from llava_ray import images
from llava_ray.config import FetchConfig, LimitsConfig
from llava_ray.errors import FetchError, ImageError, ImageUrlError, LlavaRayError
from llava_ray.serve.fetch.client import Fetcher
from llava_ray.serve.fetch.ip_policy import is_public
from llava_ray.serve.fetch.url_policy import check_url, read_image_url
from llava_ray.types import ChatRequest, ImagePart, Message, TextPart
from tests.support.web_servers import PRIVATE, PUBLIC, BadWeb, png, run_bad_web

OPEN = FetchConfig(hosts=["*"])
PARAM = "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    "address",
    "8.8.8.8 1.1.1.1 93.184.216.34 172.32.0.1 100.128.0.1 2606:4700::1 2a00:1450::1".split(),
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    """0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16
    169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1
    198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:7f00:1 64:ff9b::7f00:1
    64:ff9b:1::1 100::1 2001::1 2001:0:7f00:1:: 2001:db8::1 2002:7f00:1:: 3fff::1 5f00::1 fc00::1
    fd00:ec2::254 fe80::1 fe80::1%1 fec0::1 ff02::1""".split(),
)
def test_addresses_that_are_not_public_are_not(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://example.org/a.png", "scheme is 'ftp'"),
        ("file:///etc/passwd", "scheme is 'file'"),
        ("gopher://example.org/", "scheme is 'gopher'"),
        ("//example.org/a.png", "scheme is ''"),
        ("http://user:word@example.org/a.png", "name or password"),
        ("http://user@example.org/a.png", "name or password"),
        ("http://@example.org/a.png", "name or password"),
        ("http://example.org\\@127.0.0.1/", "name or password"),
        ("http://example.org:8080/a.png", "port is 8080"),
        ("http://example.org:0/a.png", "port is 0"),
        ("http://example.org:22/a.png", "port is 22"),
        ("http://127.0.0.1/", "not on the public internet"),
        ("http://169.254.169.254/latest/meta-data/", "not on the public internet"),
        ("http://[::1]/", "not on the public internet"),
        ("http://[::ffff:127.0.0.1]/", "not on the public internet"),
        ("http://[64:ff9b::7f00:1]/", "not on the public internet"),
        ("http://[2002:7f00:1::]/", "not on the public internet"),
        ("http://[fe80::1%25eth0]/", "odd way"),
        ("http://[::1%lo]/", "odd way"),
        ("http://2130706433/", "odd way"),
        ("http://017700000001/", "odd way"),
        ("http://0x7f000001/", "odd way"),
        ("http://0x7f.0.0.1/", "odd way"),
        ("http://127.0.0.0x1/", "odd way"),
        ("http://127.1/", "odd way"),
        ("http://0/", "odd way"),
        ("http://0177.0.0.1/", "not a valid one"),
        ("http://127.0.0.1./", "not a name"),
        ("http://localhost./", "not a name"),
        ("http://example.org./a.png", "not a name"),
        ("http://a..b/", "not a name"),
        ("http://%31%32%37.0.0.1/", "odd way"),
        ("http://%6cocalhost/", "not a name"),
        ("http://-a.org/", "not a name"),
        ("http:///a.png", "not a name"),
        ("http:a.png", "not a name"),
        ("http://①②⑦.⓪.⓪.①/", "not a valid one"),
        ("http://exa\tmple.org/", "not a valid one"),
        ("http://example.org:99999/", "port is 99999"),
        ("http://" + "a" * 64 + ".org/", "not a name"),
        ("http://example.org/" + "a" * 5000, "more than 4,096 characters"),
    ],
)
def test_an_address_that_leads_elsewhere_is_refused_with_the_remedy(url: str, words: str) -> None:
    with pytest.raises(ImageUrlError, match=words) as caught:
        check_url(url, OPEN, param=PARAM)
    assert (caught.value.status, caught.value.code) == (400, "image_url_refused")
    assert caught.value.param == PARAM
    assert "data:image/png;base64" in caught.value.message
    assert len(caught.value.message) < 300


def test_names_that_are_fine_are_fine() -> None:
    for url in (
        "http://example.org",
        "HTTPS://Example.org:443/a%20b.png?size=2&x=@y#there",
        "http://bücher.example/ä.png",
        "https://a_b.example/",
        "http://93.184.216.34/",
        "http://[2606:4700::1]:80/",
        "http://3com.example/",
    ):
        assert check_url(url, OPEN, param=PARAM).host


def test_with_a_list_of_hosts_there_are_no_others() -> None:
    config = FetchConfig(hosts=["Images.example", "*.trusted.example"])
    for host in ("images.example", "a.trusted.example", "a.b.trusted.example"):
        assert check_url(f"http://{host}/", config, param=PARAM).host == host
    for host in ("example.org", "trusted.example", "untrusted.example", "x.images.example"):
        with pytest.raises(ImageUrlError, match=r"not among those allowed; use Images\.example"):
            check_url(f"http://{host}/", config, param=PARAM)


def test_nothing_is_fetched_unless_the_configuration_names_hosts() -> None:
    with pytest.raises(ImageError, match="not fetched from the web by this server"):
        read_image_url("http://example.org/a.png", limits=LimitsConfig(), param=PARAM)


class NameServer:
    """Returns the next answer of its list for a name, and the last one from then on."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = answers
        self.num_asked = 0

    async def resolve(self, host: str, port: int) -> list[str]:
        self.num_asked += 1
        answers = self.answers[host.partition(".")[0]]
        return answers.pop(0) if len(answers) > 1 else answers[0]


class World:
    """A fetcher, the misbehaving web servers, and their name server."""

    def __init__(self, web: BadWeb, fetch: dict[str, Any], limits: dict[str, Any]) -> None:
        self.web = web
        self.names = NameServer(
            good=[[PUBLIC]],
            other=[[PUBLIC]],
            inner=[[PRIVATE]],
            both=[[PUBLIC, PRIVATE]],
            turning=[[PUBLIC], [PRIVATE]],
            mapped=[["::ffff:127.0.0.1"]],
            link=[["fe80::1%2"]],
            none=[[]],
        )
        self.limits = LimitsConfig(
            fetch=FetchConfig.model_validate(
                {"hosts": ["*"], "ports": [web.port], "networks": [f"{PUBLIC}/32"], **fetch}
            ),
            **limits,
        )
        self.fetcher = Fetcher(self.limits, resolve=self.names.resolve)

    def url(self, path: str, host: str = "good.example") -> str:
        return path if path.startswith("http") else f"http://{host}:{self.web.port}{path}"

    async def get(self, *paths: str) -> list[bytes]:
        parts = [
            read_image_url(self.url(path), limits=self.limits, param=f"image {number}")
            for number, path in enumerate(paths)
        ]
        request = ChatRequest("1", "m", (Message("user", (TextPart("Look"), *parts)),))
        filled = await self.fetcher.fetch_images(request)
        assert filled.messages[0].parts[0] == TextPart("Look")
        return [part.data for part in filled.messages[0].parts if isinstance(part, ImagePart)]


@asynccontextmanager
async def world(fetch: dict[str, Any] | None = None, **limits: Any) -> AsyncIterator[World]:
    async with run_bad_web() as web:
        yield World(web, fetch or {}, limits)


def run(
    play: Callable[[World], Awaitable[Any]], fetch: dict[str, Any] | None = None, **limits: Any
) -> Any:
    async def go() -> Any:
        async with asyncio.timeout(60), world(fetch, **limits) as there:
            result = await play(there)
            assert there.web.num_inner == 0, "the inner network was reached"
            return result

    return asyncio.run(go())


def test_images_are_fetched_by_name_each_address_once() -> None:
    async def play(there: World) -> None:
        found = await there.get("/a.png", "/b.png", "/a.png", "/to//d.png")
        assert found == [png()] * 4
        assert there.web.num_asked["/a.png"] == 1
        assert set(there.web.hosts) == {f"good.example:{there.web.port}"}

    run(play)


def test_a_request_without_addresses_is_left_as_it_is() -> None:
    request = ChatRequest("1", "m", (Message("user", (ImagePart(b"data"),)),))
    assert run(lambda there: there.fetcher.fetch_images(request)) is request


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("inner.example", "not on the public internet"),
        ("both.example", "not on the public internet"),
        ("mapped.example", "not on the public internet"),
        ("link.example", "not on the public internet"),
        (PRIVATE, "not on the public internet"),
    ],
)
@pytest.mark.parametrize("is_redirect", [False, True])
def test_no_name_leads_into_the_inner_network(host: str, words: str, is_redirect: bool) -> None:
    async def play(there: World) -> None:
        url = there.url("/a.png", host)
        with pytest.raises(ImageUrlError, match=words) as caught:
            await there.get(f"/to/{url}" if is_redirect else url)
        assert caught.value.param == "image 0"

    run(play)


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://good.example/a.png",
        "data:image/png;base64,AAAA",
        "http://user:word@good.example:PORT/a.png",
        "http://good.example:22/a.png",
        "http://2130706434:PORT/",
        "http://0x7f.0.0.2:PORT/",
        "http://[::ffff:127.0.0.2]:PORT/",
        "//127.0.0.2:PORT/a.png",
    ],
)
def test_a_redirect_is_checked_like_an_address(target: str) -> None:
    async def play(there: World) -> None:
        with pytest.raises(ImageUrlError):
            await there.get(f"/to/{target}")

    run(play)


def test_a_name_that_changes_its_mind_is_asked_once_for_each_connection() -> None:
    async def play(there: World) -> None:
        turning = there.url("/a.png", "turning.example")
        assert await there.get(turning) == [png()]  # connected to what was checked
        assert there.names.num_asked == 1
        with pytest.raises(ImageUrlError):
            await there.get(turning)
        there.names.answers["turning"] = [[PUBLIC], [PRIVATE]]
        with pytest.raises(ImageUrlError):  # the second time on the way of one image
            await there.get(there.url(f"/to/{turning}", "turning.example"))

    run(play)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/loop", "redirects more often than the 3 allowed"),
        ("/nowhere", "redirects to nothing"),
        ("/to/http://good.example:bad/", "redirects to nothing that is an address"),
        ("/endless", "more than the 100,000 bytes"),
        ("/announced", "more than the 100,000 bytes"),
        ("/bomb", "compressed answer"),
        ("/short", "broke off"),
        ("/garbage", "broke off"),
        ("/hang-up", "broke off"),
        ("/type/text/html", "'text/html', which is not an image"),
        ("/type/application/json", "'application/json', which"),
        ("/status/404", "answered 404"),
        ("/status/500", "answered 500"),
        ("/status/204", "answered 204"),
        ("/status/304", "answered 304"),
        ("/drip-head", "took longer than the 0.6 s"),
        ("/drip-body", "took longer than the 0.6 s"),
        ("/silent", "took longer than the 0.6 s"),
        ("http://none.example:PORT/", "could not be reached"),
    ],
)
def test_a_bad_web_server_is_named_and_what_it_did(path: str, words: str) -> None:
    async def play(there: World) -> None:
        with pytest.raises(FetchError, match=words) as caught:
            await there.get(path.replace("PORT", str(there.web.port)))
        assert (caught.value.status, caught.value.code) == (422, "image_fetch_failed")
        assert "example" in caught.value.message
        assert there.web.num_sent < 20e6

    timeout_s = 0.6 if "took longer" in words else 25  # or a busy machine is too slow for the rest
    run(play, {"timeout_s": timeout_s}, max_image_bytes=100_000)


@pytest.mark.parametrize(
    "media_type", ["image/webp", "image/mpo", "None", "binary/octet-stream", ""]
)
def test_a_media_type_that_may_be_an_image_is_taken(media_type: str) -> None:
    assert run(lambda there: there.get(f"/type/{media_type}")) == [png()]


def test_the_images_of_a_request_are_limited_together() -> None:
    async def play(there: World) -> None:
        assert len((await there.get("/kilobytes/30"))[0]) == 30 * 1024
        with pytest.raises(FetchError, match="allowed together"):
            await there.get("/kilobytes/30", "/kilobytes/31", "/kilobytes/32", "/kilobytes/33")

    run(play, max_body_bytes=100_000)


def test_a_slow_server_holds_up_only_those_who_named_it() -> None:
    async def play(there: World) -> None:
        slow = [asyncio.create_task(there.get(f"/silent?{number}")) for number in range(2)]
        while there.web.num_asked.total() < 2:
            await asyncio.sleep(0.01)
        late = asyncio.create_task(there.get("/a.png"))
        assert await there.get(there.url("/a.png", "other.example")) == [png()]
        assert not late.done()
        for task in slow:
            task.cancel()
        assert await late == [png()]

    run(play, {"max_per_host": 2, "timeout_s": 25})


def test_one_bad_image_stops_the_others() -> None:
    async def play(there: World) -> None:
        with pytest.raises(LlavaRayError, match="answered 404"):
            await there.get("/drip-body", "/status/404", "/silent")

    run(play, {"timeout_s": 25})


def test_tls_verifies_the_name_and_not_the_address(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "good.example")
    server, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    server.load_cert_chain(certificate)
    trusting.load_verify_locations(certificate)

    async def play() -> None:
        async with asyncio.timeout(60), run_bad_web(server) as web:
            there = World(web, {}, {})
            there.fetcher = Fetcher(there.limits, resolve=there.names.resolve, ssl_context=trusting)
            assert await there.get(f"https://good.example:{web.port}/a.png") == [png()]
            with pytest.raises(FetchError, match="could not be reached"):
                await there.get(f"https://other.example:{web.port}/a.png")
            there.fetcher = Fetcher(there.limits, resolve=there.names.resolve)
            with pytest.raises(FetchError, match="could not be reached"):
                await there.get(f"https://good.example:{web.port}/a.png")

    asyncio.run(play())


def make_certificate(folder: Path, host: str) -> Path:
    """Write a self-signed certificate for a host, with its key, and return the file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    certificate = (
        x509.CertificateBuilder(name, name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(pem) + key.private_bytes(pem, *plain))
    return path


def test_a_file_that_was_fetched_and_is_no_image_is_the_web_servers_fault() -> None:
    part = ImagePart(b"<html>", PARAM, "https://good.example/secret-path")
    with pytest.raises(FetchError, match=r"good\.example: this is an HTML page") as caught:
        images.decode(part, limits=LimitsConfig())
    assert caught.value.param == PARAM
    assert "secret" not in caught.value.message
