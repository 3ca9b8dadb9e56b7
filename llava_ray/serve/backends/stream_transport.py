"""Carries response chunks from a replica to the gateway over a TCP connection of their own.

Ray turns every item of a stream into an object, which costs about a millisecond of CPU time in
each of the two processes. Here all chunks that a replica has ready for one gateway at the same
moment travel as one message.

Only the chunks after the first one of a request go this way. The first chunk, errors and the end of
the stream still come through Ray, which detects dead replicas. If no connection can be made,
everything goes through Ray.

    gateway: StreamReceiver.register() -> ResponseStream; its `address` goes to the replica
    replica: StreamSenders.forward(chunks, address)

On the wire: the gateway's 32-byte secret, then messages. A message is its length (4 bytes,
big-endian) and a pickled list of (stream id, chunk). Nothing is unpickled before the sender has
proved that it knows the secret, which only travels through Ray. The connection is not encrypted,
like Ray's own traffic between machines.
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
_CONNECT_TIMEOUT_S = 1.0
_RETRY_AFTER_S = 60.0
"""Time before a replica tries again to connect to a gateway that it could not reach."""
_LATE_CHUNKS_S = 2.0
"""How long the last chunks may still arrive after Ray reported the end of a stream."""
_MAX_UNREAD_BYTES = 64 << 20


class StreamAddress(NamedTuple):
    """Where a replica sends the chunks of one request."""

    host: str
    port: int
    secret: bytes
    stream_id: int


class StreamReceiver:
    """The gateway's side: receives the chunks of all requests that this gateway waits for."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        uses_tls = os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")
        self._is_closed = uses_tls  # this connection would not be encrypted, Ray's is
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._stream_ids = itertools.count()
        self._streams: dict[int, ResponseStream] = {}
        self._writers: set[asyncio.StreamWriter] = set()

    async def register(self) -> "ResponseStream":
        """Return the stream that will receive the chunks of one request."""
        async with self._opening:
            if self._server is None and not self._is_closed:
                await self._open()
        stream = ResponseStream(self, next(self._stream_ids))
        if self._server:
            host, port = self._server.sockets[0].getsockname()[:2]
            stream.address = StreamAddress(host, port, self._secret, stream.stream_id)
            self._streams[stream.stream_id] = stream
        return stream

    def discard(self, stream_id: int) -> None:
        """Ignore chunks that still arrive for this stream."""
        self._streams.pop(stream_id, None)

    def close(self) -> None:
        """Accept no more connections and close the existing ones."""
        if self._server:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _open(self) -> None:
        try:
            host = ray.util.get_node_ip_address()
            self._server = await asyncio.start_server(self._receive, host, 0)
        except OSError as error:
            self._is_closed = True
            log.logger.warning(f"response chunks come through Ray only: {error}")

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read what one replica sends until it disconnects."""
        self._writers.add(writer)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                secret = await reader.readexactly(_SECRET_BYTES)
            while hmac.compare_digest(secret, self._secret):
                size = int.from_bytes(await reader.readexactly(4))
                for stream_id, chunk in pickle.loads(await reader.readexactly(size)):
                    if stream := self._streams.get(stream_id):
                        stream.put(chunk)
        except (asyncio.IncompleteReadError, OSError):  # TimeoutError is an OSError
            pass  # its unfinished requests end with the error that Ray raises
        finally:
            self._writers.discard(writer)
            writer.close()


class ResponseStream:
    """The chunks of one request, merged from Ray and from the direct connection.

    Attributes:
        stream_id: identifies this request on the connection.
        address: where the replica may send chunks; None: everything comes through Ray.
    """

    address: StreamAddress | None = None

    def __init__(self, receiver: StreamReceiver, stream_id: int) -> None:
        self.stream_id = stream_id
        self._receiver = receiver
        self._items: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        self._response: Any = None
        self._num_open = 0

    def put(self, chunk: Chunk) -> None:
        self._items.put_nowait(chunk)

    def follow(self, first: Chunk, response: Any, *, num_answers: int) -> None:
        """Read the rest of Ray's stream as well.

        Args:
            first: the chunk that was already read; it is not yielded again.
            response: the response generator that a Serve handle returned.
            num_answers: how many chunks with a `finish_reason` complete the stream.
        """
        self._response = response
        self._num_open = num_answers - (first.finish_reason is not None)
        self._following = asyncio.create_task(self._read_response())

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield the chunks in the order of their arrival until every answer has finished.

        Iteration ends early if Ray's stream does. Exceptions of Ray's stream are raised.
        """
        timeout_s = None
        try:
            while self._num_open:
                try:
                    async with asyncio.timeout(timeout_s):
                        item = await self._items.get()
                except TimeoutError:
                    return
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    timeout_s = _LATE_CHUNKS_S if self.address else 0
                    continue
                self._num_open -= item.finish_reason is not None
                yield item
            await self._following
        finally:
            self.discard()

    def cancel(self) -> None:
        """Stop the replica's work on this request."""
        self.discard()
        self._response.cancel()

    def discard(self) -> None:
        """Ignore chunks that still arrive on the direct connection."""
        self._receiver.discard(self.stream_id)

    async def _read_response(self) -> None:
        try:
            async for chunk in self._response:
                self._items.put_nowait(chunk)
        except Exception as error:  # noqa: BLE001 - raised where the chunks are read
            self._items.put_nowait(error)
        finally:
            self._items.put_nowait(None)


class StreamSenders:
    """The replica's side: one connection to each gateway."""

    def __init__(self) -> None:
        self._senders: dict[tuple[str, int], StreamSender] = {}
        self._failed_at: dict[tuple[str, int], float] = {}
        self._connecting = asyncio.Lock()

    async def forward(
        self, chunks: AsyncIterator[Chunk], address: StreamAddress | None
    ) -> AsyncIterator[Chunk]:
        """Send chunks to the gateway, and yield those that must go through Ray.

        These are the first chunk or, without a connection, all chunks.

        Raises:
            EngineError: the gateway disconnected or does not read what it is sent.
        """
        sender = await self.connect(address) if address else None
        is_first = True
        async for chunk in chunks:
            if is_first or not (sender and address):
                yield chunk
            else:
                sender.send(address.stream_id, chunk)
            is_first = False

    async def connect(self, address: StreamAddress) -> "StreamSender | None":
        """Return the connection to a gateway; None: the gateway cannot be reached."""
        endpoint = (address.host, address.port)
        async with self._connecting:
            sender = self._senders.get(endpoint)
            if sender and sender.is_open:
                return sender
            if sender:
                sender.close()
            if time.monotonic() - self._failed_at.get(endpoint, float("-inf")) < _RETRY_AFTER_S:
                return None
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(*endpoint)
            except (OSError, TimeoutError) as error:
                self._failed_at[endpoint] = time.monotonic()
                log.logger.warning(
                    f"response chunks go to {address.host} through Ray only: {error!r}"
                )
                return None
            _enable_keepalive(writer.get_extra_info("socket"))
            writer.write(address.secret)
            sender = self._senders[endpoint] = StreamSender(reader, writer)
            return sender

    def close(self) -> None:
        """Close all connections."""
        for sender in self._senders.values():
            sender.close()


class StreamSender:
    """One connection from a replica to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._pending: list[tuple[int, Chunk]] = []

    @property
    def is_open(self) -> bool:
        return not (self._reader.at_eof() or self._writer.transport.is_closing())

    def send(self, stream_id: int, chunk: Chunk) -> None:
        """Queue a chunk; all chunks queued in one event loop iteration are sent as one message.

        Raises:
            EngineError: the gateway disconnected.
        """
        if not self.is_open:
            raise EngineError("the gateway that sent this request is gone")
        self._pending.append((stream_id, chunk))
        if len(self._pending) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        self._writer.close()

    def _flush(self) -> None:
        message = pickle.dumps(self._pending, protocol=pickle.HIGHEST_PROTOCOL)
        self._pending = []
        self._writer.writelines([len(message).to_bytes(4), message])
        if self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._writer.transport.abort()


def _enable_keepalive(connection: socket.socket) -> None:
    """Send TCP keepalives: cloud firewalls drop connections that are idle for minutes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}.items():
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
