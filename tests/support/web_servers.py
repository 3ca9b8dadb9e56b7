"""Misbehaving web servers on loopback addresses, and a name server with programmable answers.

127.0.0.1 stands for the public internet and 127.0.0.2 for the inner network; the fetcher's
configuration (`FetchConfig.networks`) tells them apart.
"""

import asyncio
import gzip
import io
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ssl import SSLContext

from PIL import Image

PUBLIC, PRIVATE = "127.0.0.1", "127.0.0.2"


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def head(status: int = 200, media_type: str = "image/png", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", "Connection: close"]
    if media_type:
        lines.append(f"Content-Type: {media_type}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


class BadWeb:
    """Both servers. `num_asked` counts requests by path, `num_inner` those to the inner one."""

    def __init__(self) -> None:
        self.num_asked: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.num_inner = 0
        self.num_sent = 0
        self.port = 0
        self.running: set[asyncio.Task[None]] = set()

    async def answer_inside(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.num_inner += 1
        writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        else:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = request.split(" ")[1].partition("?")[0]
        self.num_asked[path] += 1
        lines = request.splitlines()
        self.hosts += [line[6:] for line in lines if line.lower().startswith("host:")]
        await self._send(path, writer)

    async def _send(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path.startswith("/to/"):
            location = path.removeprefix("/to/").replace("PORT", str(self.port))
            writer.write(head(302, Location=location))
        elif path == "/loop":
            writer.write(head(302, Location="/loop"))
        elif path == "/nowhere":
            writer.write(head(302))
        elif path == "/drip-head":
            await self._drip(writer, b"HTTP/1.1 200 OK\r\n" + b"X-Header: y\r\n" * 10_000)
        elif path == "/drip-body":
            writer.write(head())
            await self._drip(writer, png() * 1000)
        elif path == "/silent":
            await asyncio.Event().wait()
        elif path == "/endless":
            writer.write(head())
            while True:
                writer.write(b"x" * 65536)
                self.num_sent += 65536
                await writer.drain()
        elif path == "/bomb":
            writer.write(head(Content_Encoding="gzip") + gzip.compress(bytes(10 << 20)))
        elif path == "/announced":
            writer.write(head(Content_Length="999999999"))
            await asyncio.Event().wait()
        elif path == "/short":
            writer.write(head(Content_Length="500") + png()[:20])
        elif path == "/garbage":
            writer.write(b"\x00\x01\x02 not HTTP\r\n\r\n")
        elif path == "/hang-up":
            return
        elif path.startswith("/type/"):
            writer.write(head(media_type=path.removeprefix("/type/")) + png())
        elif path.startswith("/status/"):
            writer.write(head(int(path.removeprefix("/status/"))) + png())
        elif path == "/empty":
            writer.write(head())
        elif path == "/text":
            writer.write(head() + b"<html>no image</html>")
        elif path.startswith("/kilobytes/"):
            writer.write(head() + bytes(1024 * int(path.removeprefix("/kilobytes/"))))
        else:
            writer.write(head() + png())
        await writer.drain()

    async def _drip(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)


@asynccontextmanager
async def run_bad_web(ssl: SSLContext | None = None) -> AsyncIterator[BadWeb]:
    web = BadWeb()
    outer = await asyncio.start_server(web.answer, PUBLIC, 0, ssl=ssl)
    web.port = outer.sockets[0].getsockname()[1]
    inner = await asyncio.start_server(web.answer_inside, PRIVATE, web.port)
    try:
        yield web
    finally:
        for task in web.running:
            task.cancel()
        outer.close()
        inner.close()
        await asyncio.sleep(0)
