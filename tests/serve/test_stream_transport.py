"""Chunks that go directly from a replica to the gateway: in order, and each exactly once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from llava_ray.config import LimitsConfig, ModelConfig
from llava_ray.errors import EngineError
from llava_ray.serve.backends.stream_transport import (
    ResponseStream,
    StreamAddress,
    StreamReceiver,
    StreamSenders,
)
from llava_ray.serve.replica.deployment import Replica
from llava_ray.types import ChatRequest, Chunk, Message, TextPart


class RayStream:
    """Stands for a stream through Ray: yields given items, then ends or fails."""

    def __init__(self, *items: Chunk | Exception) -> None:
        self._items = items
        self.go = asyncio.Event()
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        await self.go.wait()
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            yield item


def chunk(text: str, *, is_last: bool = False) -> Chunk:
    return Chunk(text, "stop" if is_last else None, 1, 2, 0)


async def collect(stream: ResponseStream) -> list[str]:
    return [each.text async for each in stream]


def run(test: Callable[[StreamReceiver, StreamSenders], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        receiver, senders = StreamReceiver(), StreamSenders()
        try:
            await asyncio.wait_for(test(receiver, senders), 30)
        finally:
            senders.close()
            receiver.close()
            while receiver._writers:
                await asyncio.sleep(0)

    asyncio.run(main())


def test_a_replica_yields_the_first_chunk_and_posts_the_others():
    async def main(receiver, senders):
        model = ModelConfig(path="echo", engine="echo", messages_per_s=1e6)
        replica = Replica(model, LimitsConfig())
        replica._senders = senders
        through_ray: list[str] = []

        async def ask(stream_id: int) -> None:
            stream = await receiver.register()
            message = Message("user", (TextPart(f"one two three {stream_id}"),))
            request = ChatRequest(f"r{stream_id}", "echo", (message,))
            expected = [each.text async for each in replica.chat(request)]
            assert len(expected) > 3
            async with aclosing(replica.chat(request, stream.address)) as chunks:
                first = await anext(chunks)
                stream.follow(first, _Noted(chunks, through_ray), num_answers=1)
                assert [first.text, *await collect(stream)] == expected

        await asyncio.gather(*map(ask, range(3)))
        assert through_ray == []

    run(main)


class _Noted:
    """The rest of a replica's stream; records the items that still arrive through it."""

    def __init__(self, chunks: Any, texts: list[str]) -> None:
        self._chunks, self._texts = chunks, texts

    def cancel(self) -> None:
        raise AssertionError

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        async for each in self._chunks:
            self._texts.append(each.text)
            yield each


def test_answers_of_many_requests_share_a_line_and_keep_apart():
    async def main(receiver, senders):
        streams = [await receiver.register() for _ in range(20)]
        reading = []
        for stream in streams:
            ray_stream = RayStream()
            ray_stream.go.set()
            stream.follow(chunk("first"), ray_stream, num_answers=1)
            reading.append(asyncio.create_task(collect(stream)))
        made = [await senders.connect(stream.address) for stream in streams if stream.address]
        assert len(set(made)) == 1
        for step in range(5):
            for stream, sender in zip(streams, made, strict=True):
                assert sender is not None
                sender.send(
                    stream.stream_id, chunk(f"{stream.stream_id}.{step}", is_last=step == 4)
                )
            await asyncio.sleep(0)
        answers = await asyncio.gather(*reading)
        assert answers == [[f"{m.stream_id}.{step}" for step in range(5)] for m in streams]

    run(main)


def test_what_ray_says_of_a_stream_counts():
    async def main(receiver, senders):
        broken, silent, plain = [await receiver.register() for _ in range(3)]
        ray_streams = [
            RayStream(EngineError("dead")),
            RayStream(),
            RayStream(chunk("b", is_last=True)),
        ]
        for stream, ray_stream in zip((broken, silent, plain), ray_streams, strict=True):
            stream.follow(chunk("a"), ray_stream, num_answers=1)
            ray_stream.go.set()
        with pytest.raises(EngineError, match="dead"):
            await collect(broken)
        assert await collect(silent) == []  # it ended, and nothing more came
        assert await collect(plain) == ["b"]
        cancelled = await receiver.register()
        ray_stream = RayStream()
        cancelled.follow(chunk("a"), ray_stream, num_answers=1)
        cancelled.cancel()
        assert ray_stream.is_cancelled

    run(main)


def test_who_does_not_know_the_secret_is_not_listened_to():
    async def main(receiver, senders):
        stream = await receiver.register()
        assert stream.address is not None
        forged = stream.address._replace(secret=bytes(32))
        sender = await senders.connect(forged)
        assert sender is not None
        sender.send(stream.stream_id, chunk("forged", is_last=True))
        while sender.is_open:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="is gone"):
            sender.send(stream.stream_id, chunk("forged", is_last=True))
        ray_stream = RayStream(chunk("true", is_last=True))
        stream.follow(chunk("a"), ray_stream, num_answers=1)
        ray_stream.go.set()
        assert await collect(stream) == ["true"]

    run(main)


def test_a_gateway_that_cannot_be_reached_is_left_to_ray():
    async def main(receiver, senders):
        address = StreamAddress("127.0.0.1", 1, bytes(32), 0)
        assert await senders.connect(address) is None
        assert await senders.connect(address) is None

    run(main)


def test_with_ray_encrypted_nothing_goes_past_it(monkeypatch):
    monkeypatch.setenv("RAY_USE_TLS", "1")

    async def main(receiver, senders):
        assert (await StreamReceiver().register()).address is None

    run(main)
