"""Chunks straight from a replica to the gateway that asked for them, past Ray's way for streams.

Ray makes an object of each item of a stream, which takes either process about a millisecond. On a
connection of their own, all chunks that a replica has for a gateway in one moment are one message.

Only chunks after an answer's first go this way. Its beginning, its errors and its end come through
Ray, which notices what happens to replicas; where no connection can be made, all goes through Ray.

    gateway: Postbox.register -> Mail, whose post the replica is handed, and which is read
    replica: Lines.pass_on(chunks, post)

On the wire: the post's secret, then messages: their length (4 bytes), and a pickled list of
(number of the post, chunk). Nothing is unpickled for a sender that does not know the secret, which
only Ray hands around; like what Ray sends between machines, it is not encrypted.
"""

import asyncio
import hmac
import itertools
import os
import pickle
import secrets
import socket
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import ray

from llava_ray.errors import EngineError
from llava_ray.serve import log
from llava_ray.types import Chunk

_SECRET_BYTES = 32
_CONNECT_S = 1.0
_RETRY_S = 60.0
"""So long a gateway that could not be reached is not tried again."""
_LATE_S = 2.0
"""So long after Ray's word that an answer has ended, its last chunks may still come."""
_MAX_UNREAD_BYTES = 64 << 20


class Post(NamedTuple):
    """Where the chunks of one answer are sent."""

    host: str
    port: int
    secret: bytes
    number: int


class Postbox:
    """Takes the chunks of all answers that a gateway waits for."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        uses_tls = os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")
        self._is_closed = uses_tls  # only Ray's own ways are encrypted
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._numbers = itertools.count()
        self._mails: dict[int, Mail] = {}
        self._writers: set[asyncio.StreamWriter] = set()

    async def register(self) -> "Mail":
        """Return what will hold the answers to a request."""
        async with self._opening:
            if self._server is None and not self._is_closed:
                await self._open()
        mail = Mail(self, next(self._numbers))
        if self._server:
            host, port = self._server.sockets[0].getsockname()[:2]
            mail.post = Post(host, port, self._secret, mail.number)
            self._mails[mail.number] = mail
        return mail

    def forget(self, number: int) -> None:
        """Let go what else comes for a post."""
        self._mails.pop(number, None)

    def close(self) -> None:
        """Take no more connections, and end those that are there."""
        if self._server:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _open(self) -> None:
        try:
            host = ray.util.get_node_ip_address()
            self._server = await asyncio.start_server(self._take, host, 0)
        except OSError as error:
            self._is_closed = True
            log.logger.warning(f"answers come through Ray alone: {error}")

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read what one replica sends, as long as it lives."""
        self._writers.add(writer)
        try:
            async with asyncio.timeout(_CONNECT_S):
                secret = await reader.readexactly(_SECRET_BYTES)
            while hmac.compare_digest(secret, self._secret):
                size = int.from_bytes(await reader.readexactly(4))
                for number, chunk in pickle.loads(await reader.readexactly(size)):
                    if mail := self._mails.get(number):
                        mail.put(chunk)
        except (asyncio.IncompleteReadError, OSError):  # OSError: TimeoutError too
            pass  # what it had begun ends with the error that Ray brings
        finally:
            self._writers.discard(writer)
            writer.close()


class Mail:
    """The chunks of a request's answers, as they come both ways.

    Attributes:
        number: of its post.
        post: where the replica may send them; None: there is no way but Ray's.
    """

    post: Post | None = None

    def __init__(self, postbox: Postbox, number: int) -> None:
        self.number = number
        self._postbox = postbox
        self._items: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        self._response: Any = None
        self._num_open = 0

    def put(self, chunk: Chunk) -> None:
        self._items.put_nowait(chunk)

    def follow(self, first: Chunk, response: Any, *, num_answers: int) -> None:
        """Read on in Ray's stream, whose first chunk this is.

        Args:
            first: what came already, and is not yielded again.
            response: what a handle returned.
            num_answers: how many chunks are the last of their answer.
        """
        self._response = response
        self._num_open = num_answers - (first.finish_reason is not None)
        self._following = asyncio.create_task(self._read_response())

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield the chunks to the last answer's last, whichever way they come.

        It ends early if Ray's stream does; what Ray's stream raises is raised.
        """
        patience_s = None
        try:
            while self._num_open:
                try:
                    async with asyncio.timeout(patience_s):
                        item = await self._items.get()
                except TimeoutError:
                    return
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    patience_s = _LATE_S if self.post else 0
                    continue
                self._num_open -= item.finish_reason is not None
                yield item
            await self._following
        finally:
            self.forget()

    def cancel(self) -> None:
        """Stop the replica's work on what is left."""
        self.forget()
        self._response.cancel()

    def forget(self) -> None:
        """Let go what else is sent."""
        self._postbox.forget(self.number)

    async def _read_response(self) -> None:
        try:
            async for chunk in self._response:
                self._items.put_nowait(chunk)
        except Exception as error:  # noqa: BLE001 - raised where the chunks are read
            self._items.put_nowait(error)
        finally:
            self._items.put_nowait(None)


class Lines:
    """A replica's connections to gateways, one to each."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int], Line] = {}
        self._failed_at: dict[tuple[str, int], float] = {}
        self._connecting = asyncio.Lock()

    async def pass_on(
        self, chunks: AsyncIterator[Chunk], post: Post | None
    ) -> AsyncIterator[Chunk]:
        """Yield what has to go through Ray: the first chunk or, without a line, all of them.

        Raises:
            EngineError: the gateway has gone, or does not read.
        """
        line = await self.connect(post) if post else None
        is_first = True
        async for chunk in chunks:
            if is_first or not (line and post):
                yield chunk
            else:
                line.send(post.number, chunk)
            is_first = False

    async def connect(self, post: Post) -> "Line | None":
        """Return the line to a post; None: its gateway cannot be reached."""
        address = (post.host, post.port)
        async with self._connecting:
            line = self._lines.get(address)
            if line and line.is_open:
                return line
            if line:
                line.close()
            if time.monotonic() - self._failed_at.get(address, float("-inf")) < _RETRY_S:
                return None
            try:
                async with asyncio.timeout(_CONNECT_S):
                    reader, writer = await asyncio.open_connection(*address)
            except (OSError, TimeoutError) as error:
                self._failed_at[address] = time.monotonic()
                log.logger.warning(f"answers go to {post.host} through Ray alone: {error!r}")
                return None
            _keep_alive(writer.get_extra_info("socket"))
            writer.write(post.secret)
            line = self._lines[address] = Line(reader, writer)
            return line

    def close(self) -> None:
        """End all connections."""
        for line in self._lines.values():
            line.close()


class Line:
    """One connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._held: list[tuple[int, Chunk]] = []

    @property
    def is_open(self) -> bool:
        return not (self._reader.at_eof() or self._writer.transport.is_closing())

    def send(self, number: int, chunk: Chunk) -> None:
        """Send a chunk, together with all others of this moment; see `pass_on`."""
        if not self.is_open:
            raise EngineError("the gateway that asked is gone")
        self._held.append((number, chunk))
        if len(self._held) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        self._writer.close()

    def _flush(self) -> None:
        message = pickle.dumps(self._held, protocol=pickle.HIGHEST_PROTOCOL)
        self._held = []
        self._writer.writelines([len(message).to_bytes(4), message])
        if self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._writer.transport.abort()


def _keep_alive(connection: socket.socket) -> None:
    """Let the system ask in quiet times: clouds' firewalls forget what is quiet for long."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}.items():
        if hasattr(socket, name):  # not all systems have all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
