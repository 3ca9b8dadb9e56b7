"""Chunks that go straight from a replica to the gateway: in order, each once, and never alone."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from llava_ray.config import LimitsConfig, ModelConfig
from llava_ray.errors import EngineError
from llava_ray.serve.backends.stream_transport import Lines, Mail, Post, Postbox
from llava_ray.serve.replica.deployment import Replica
from llava_ray.types import ChatRequest, Chunk, Message, TextPart


class RayStream:
    """Stands for a stream through Ray: says what it is told, then ends, or fails."""

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


async def collect(mail: Mail) -> list[str]:
    return [each.text async for each in mail]


def run(test: Callable[[Postbox, Lines], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        postbox, lines = Postbox(), Lines()
        try:
            await asyncio.wait_for(test(postbox, lines), 30)
        finally:
            lines.close()
            postbox.close()
            while postbox._writers:
                await asyncio.sleep(0)

    asyncio.run(main())


def test_a_replica_yields_the_first_chunk_and_posts_the_others():
    async def main(postbox, lines):
        model = ModelConfig(path="echo", engine="echo", messages_per_s=1e6)
        replica = Replica(model, LimitsConfig())
        replica._lines = lines
        through_ray: list[str] = []

        async def ask(number: int) -> None:
            mail = await postbox.register()
            message = Message("user", (TextPart(f"one two three {number}"),))
            request = ChatRequest(f"r{number}", "echo", (message,))
            expected = [each.text async for each in replica.chat(request)]
            assert len(expected) > 3
            async with aclosing(replica.chat(request, mail.post)) as chunks:
                first = await anext(chunks)
                mail.follow(first, _Noted(chunks, through_ray), num_answers=1)
                assert [first.text, *await collect(mail)] == expected

        await asyncio.gather(*map(ask, range(3)))
        assert through_ray == []

    run(main)


class _Noted:
    """The rest of a replica's stream; notes what still comes through it."""

    def __init__(self, chunks: Any, texts: list[str]) -> None:
        self._chunks, self._texts = chunks, texts

    def cancel(self) -> None:
        raise AssertionError

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        async for each in self._chunks:
            self._texts.append(each.text)
            yield each


def test_answers_of_many_requests_share_a_line_and_keep_apart():
    async def main(postbox, lines):
        mails = [await postbox.register() for _ in range(20)]
        reading = []
        for mail in mails:
            stream = RayStream()
            stream.go.set()
            mail.follow(chunk("first"), stream, num_answers=1)
            reading.append(asyncio.create_task(collect(mail)))
        made = [await lines.connect(mail.post) for mail in mails if mail.post]
        assert len(set(made)) == 1
        for step in range(5):
            for mail, line in zip(mails, made, strict=True):
                assert line is not None
                line.send(mail.number, chunk(f"{mail.number}.{step}", is_last=step == 4))
            await asyncio.sleep(0)
        answers = await asyncio.gather(*reading)
        assert answers == [[f"{m.number}.{step}" for step in range(5)] for m in mails]

    run(main)


def test_what_ray_says_of_a_stream_counts():
    async def main(postbox, lines):
        broken, silent, plain = [await postbox.register() for _ in range(3)]
        streams = [RayStream(EngineError("dead")), RayStream(), RayStream(chunk("b", is_last=True))]
        for mail, stream in zip((broken, silent, plain), streams, strict=True):
            mail.follow(chunk("a"), stream, num_answers=1)
            stream.go.set()
        with pytest.raises(EngineError, match="dead"):
            await collect(broken)
        assert await collect(silent) == []  # it ended, and nothing more came
        assert await collect(plain) == ["b"]
        cancelled = await postbox.register()
        stream = RayStream()
        cancelled.follow(chunk("a"), stream, num_answers=1)
        cancelled.cancel()
        assert stream.is_cancelled

    run(main)


def test_who_does_not_know_the_secret_is_not_listened_to():
    async def main(postbox, lines):
        mail = await postbox.register()
        assert mail.post is not None
        forged = mail.post._replace(secret=bytes(32))
        line = await lines.connect(forged)
        assert line is not None
        line.send(mail.number, chunk("forged", is_last=True))
        while line.is_open:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="is gone"):
            line.send(mail.number, chunk("forged", is_last=True))
        stream = RayStream(chunk("true", is_last=True))
        mail.follow(chunk("a"), stream, num_answers=1)
        stream.go.set()
        assert await collect(mail) == ["true"]

    run(main)


def test_a_gateway_that_cannot_be_reached_is_left_to_ray():
    async def main(postbox, lines):
        post = Post("127.0.0.1", 1, bytes(32), 0)
        assert await lines.connect(post) is None
        assert await lines.connect(post) is None

    run(main)


def test_with_ray_encrypted_nothing_goes_past_it(monkeypatch):
    monkeypatch.setenv("RAY_USE_TLS", "1")

    async def main(postbox, lines):
        assert (await Postbox().register()).post is None

    run(main)
