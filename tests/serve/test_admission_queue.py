"""A model's slots are given to API keys in turn, one for each answer, and none is lost."""

import asyncio

import pytest

from llava_ray.errors import OverloadedError
from llava_ray.serve.backends.admission_queue import AdmissionQueue


def test_slots_go_to_the_keys_in_turn_and_none_is_lost() -> None:
    async def scene() -> None:
        waiting: list[int] = []
        queue = AdmissionQueue(
            "m", num_slots=1, max_waiting=None, max_wait_s=30, note_waiting=waiting.append
        )
        order: list[str] = []

        async def ask(key: str) -> None:
            await queue.acquire(key)
            order.append(key)
            await asyncio.sleep(0)
            queue.release(1)

        await queue.acquire("first")
        tasks = [asyncio.create_task(ask(key)) for key in "aaaabbc"]
        await asyncio.sleep(0)
        assert queue.num_waiting == 7
        tasks[1].cancel()
        await asyncio.sleep(0)
        queue.release(1)
        tasks[0].cancel()  # at the moment when it got its slot
        await asyncio.wait(tasks)
        assert order == ["b", "c", "a", "b", "a"]
        assert queue.num_waiting == 0
        assert waiting[:8] == [1, 2, 3, 4, 5, 6, 7, 6]
        assert waiting[-1] == 0
        await queue.acquire("last")

    asyncio.run(scene())


def test_a_request_that_is_cancelled_while_it_is_evicted_gives_up_no_slot() -> None:
    async def scene() -> None:
        queue = AdmissionQueue("m", num_slots=1, max_waiting=2, max_wait_s=30)
        await queue.acquire("first")
        tasks = [asyncio.create_task(queue.acquire("many")) for _ in range(2)]
        await asyncio.sleep(0)
        late = asyncio.create_task(queue.acquire("one"))
        await asyncio.sleep(0)  # it evicts the last of the others
        tasks[1].cancel()
        await asyncio.wait(tasks[1:])
        assert queue.num_waiting == 2
        assert not late.done()

    asyncio.run(scene())


def test_a_queue_in_which_nobody_may_wait_refuses_at_once() -> None:
    async def scene() -> None:
        queue = AdmissionQueue("m", num_slots=1, max_waiting=0, max_wait_s=30)
        await queue.acquire("a")
        with pytest.raises(OverloadedError, match="0 requests are waiting already"):
            await queue.acquire("b")

    asyncio.run(scene())


def test_a_request_takes_a_slot_for_each_of_its_answers_and_is_not_overtaken() -> None:
    async def scene() -> None:
        queue = AdmissionQueue("m", num_slots=4, max_waiting=None, max_wait_s=30)
        assert await queue.acquire("a", 3) == 3
        many = asyncio.create_task(queue.acquire("b", 64))  # gets all there are
        one = asyncio.create_task(queue.acquire("c"))
        await asyncio.sleep(0)
        queue.release(2)
        await asyncio.sleep(0)
        assert not many.done()
        assert not one.done()
        queue.release(1)
        assert await many == 4
        assert not one.done()
        queue.release(4)
        assert await one == 1
        assert await queue.acquire("d", 3) == 3

    asyncio.run(scene())


def test_slots_that_a_cancelled_request_has_collected_go_to_the_next() -> None:
    async def scene() -> None:
        queue = AdmissionQueue("m", num_slots=3, max_waiting=None, max_wait_s=30)
        await queue.acquire("a", 3)
        many = asyncio.create_task(queue.acquire("b", 3))
        two = asyncio.create_task(queue.acquire("c", 2))
        await asyncio.sleep(0)
        queue.release(2)
        many.cancel()
        assert await two == 2
        queue.release(3)
        assert await queue.acquire("d", 3) == 3

    asyncio.run(scene())
