"""Several answers to one request at once: each its own, all stopped together."""

import asyncio
from contextlib import aclosing

import pytest

from llava_ray.config import LimitsConfig
from llava_ray.engine.chat import chat
from llava_ray.engine.echo import EchoEngine
from llava_ray.engine.fanout import fan_out, stream_all
from llava_ray.errors import ContextLengthError
from llava_ray.types import ChatRequest, Chunk, Message, Sampling, TextPart
from tests.support.engine_requests import answer, load, prompt
from tests.support.tiny_checkpoint import make_image


def join(chunks: list[Chunk]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        texts[chunk.answer] = texts.get(chunk.answer, "") + chunk.text
    return dict(sorted(texts.items()))


async def read_all(engine, prompts) -> list[Chunk]:
    return [chunk async for chunk in stream_all(engine, prompts)]


def test_a_seed_gives_answers_that_differ_and_can_be_repeated() -> None:
    async def main() -> None:
        engine = load()
        asked = prompt("a <image>", make_image(), temperature=1.0, seed=3, max_tokens=8)
        first = join(await read_all(engine, fan_out(asked, 3)))
        again = join(await read_all(engine, fan_out(asked, 3)))
        assert first == again
        assert len(set(first.values())) == 3
        alone = prompt("a <image>", make_image(), temperature=1.0, seed=4, max_tokens=8)
        assert first[1] == await answer(engine, alone)
        await engine.close()

    asyncio.run(main())


def test_answers_come_side_by_side_and_each_ends_once() -> None:
    async def main() -> None:
        engine = EchoEngine()
        prompts = [prompt("one two three", max_tokens=n) for n in (1, 2, 9)]
        prompts = [fan_out(each, 1)[0] for each in prompts]
        named = [
            each.__class__(f"id-{i}", each.text, (), each.sampling)
            for i, each in enumerate(prompts)
        ]
        chunks = await read_all(engine, named)
        assert [chunk.answer for chunk in chunks[:3]] == [0, 1, 2]
        ended = {chunk.answer: chunk.finish_reason for chunk in chunks if chunk.finish_reason}
        assert ended == {0: "length", 1: "length", 2: "stop"}
        assert join(chunks)[1] == "one two"
        assert engine.stats()["num_running"] == 0

    asyncio.run(main())


def test_leaving_stops_all_answers() -> None:
    async def main() -> None:
        engine = load()
        endless = prompt("a", max_tokens=None, ignore_eos=True)
        async with aclosing(stream_all(engine, fan_out(endless, 4))) as chunks:
            seen = set()
            async for chunk in chunks:
                seen.add(chunk.answer)
                if len(seen) == 4:
                    break
        await engine.check()
        assert engine.stats()["num_running"] == engine.stats()["cache_tokens_used"] == 0
        await engine.close()

    asyncio.run(main())


def test_one_prompt_that_does_not_fit_stops_the_others() -> None:
    async def main() -> None:
        engine = load()
        endless = prompt("a", max_tokens=None, ignore_eos=True)
        with pytest.raises(ContextLengthError):
            await read_all(engine, [endless, prompt("A" * 600)])
        await engine.check()
        assert engine.stats()["num_running"] == 0
        await engine.close()

    asyncio.run(main())


def test_white_space_before_each_answer_of_a_chat_is_left_out() -> None:
    async def main() -> None:
        request = ChatRequest(
            "id", "m", (Message("user", (TextPart("Hello"),)),), Sampling(), num_answers=2
        )
        chunks = [each async for each in chat(EchoEngine(), request, limits=LimitsConfig())]
        assert join(chunks) == dict.fromkeys((0, 1), "Hello (0 images)")

    asyncio.run(main())
