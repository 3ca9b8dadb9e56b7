"""Streams several answers to one question at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def stream_together(
    streams: Sequence[AsyncGenerator[Item]],
) -> AsyncGenerator[list[Item | None]]:
    """Yield the latest item of each stream, whenever one of them has a new one.

    A stream without an item yet is represented by None. Closing this iterator closes all streams,
    and an exception in one of them ends all of them.
    """
    newest: list[Item | None] = [None] * len(streams)
    is_new = asyncio.Event()

    async def follow(number: int) -> None:
        async with aclosing(streams[number]) as stream:
            async for item in stream:
                newest[number] = item
                is_new.set()

    # Not a TaskGroup: the caller may take each item in another task.
    tasks = [asyncio.create_task(follow(number)) for number in range(len(streams))]
    for task in tasks:
        task.add_done_callback(lambda _: is_new.set())
    try:
        while not all(task.done() for task in tasks) or is_new.is_set():
            await is_new.wait()
            is_new.clear()
            if any(item is not None for item in newest):
                yield list(newest)
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
