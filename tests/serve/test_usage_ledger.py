"""Usage over several gateways: real ones that share a ledger, without Ray."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from llava_ray.config import KeyConfig, hash_key
from llava_ray.serve.gateway.usage_ledger import Counts, ExchangeCounts, LedgerReply, UsageLedger
from tests.support.local_gateway import KEYS, Nearby, run_nearby

Scene = Callable[[Nearby, Nearby, Callable[[], Awaitable[Nearby]]], Awaitable[None]]


def play(scene: Scene, exchange: ExchangeCounts | None = None, **limits: Any) -> None:
    """Run a scenario at two gateways that share a ledger; a third one starts on demand."""
    keys = [KeyConfig(name=name, sha256=hash_key(key), **limits) for name, key in KEYS.items()]
    ledger = UsageLedger()

    async def tell(gateway: str, counts: Counts) -> LedgerReply:
        return ledger.exchange(gateway, counts)

    async def go() -> None:
        async with AsyncExitStack() as stack:

            async def start() -> Nearby:
                nearby = run_nearby(exchange=exchange or tell, api_keys=keys)
                return await stack.enter_async_context(nearby)

            await scene(await start(), await start(), start)

    asyncio.run(go())


async def read_usage(there: Nearby) -> dict[str, Any]:
    reply = (await there.get("/usage", "alice")).json()
    assert reply == (await there.get("/v1/usage", "alice")).json()
    assert reply["complete"]
    (usage,) = reply["data"]
    return usage


def test_usage_is_that_of_all_gateways_and_outlives_them() -> None:
    async def scene(one: Nearby, two: Nearby, start: Callable[[], Awaitable[Nearby]]) -> None:
        for there in (one, two, two):
            assert (await there.say("Hello", "alice")).status_code == 200
        assert (await two.say("", "alice")).status_code == 400
        await one.say("Hello", "bob")
        await read_usage(two)
        for there in (one, two, await start()):
            usage = await read_usage(there)
            assert (usage["key"], usage["requests"], usage["errors"]) == ("alice", 4, 1)
            assert (usage["completion_tokens"], usage["total_tokens"]) == (9, 30)

    play(scene)


def test_a_budget_is_one_over_all_gateways() -> None:
    async def scene(one: Nearby, two: Nearby, start: Callable[[], Awaitable[Nearby]]) -> None:
        await read_usage(one)
        assert (await one.say("Hello", "alice")).status_code == 200
        assert (await two.say("Hello", "alice")).status_code == 200
        await read_usage(two)
        await read_usage(one)
        assert (await one.say("Hello", "alice")).status_code == 429
        later = await start()
        await read_usage(later)
        assert (await later.say("Hello", "alice")).status_code == 200  # it starts with a full one

    play(scene, requests_per_min=2)


def test_counts_are_exchanged_by_themselves() -> None:
    ledger = UsageLedger()
    told = asyncio.Event()

    async def exchange(gateway: str, counts: Counts) -> LedgerReply:
        if counts["alice"]["requests"]:
            told.set()
        return ledger.exchange(gateway, counts)

    async def scene(one: Nearby, _: Nearby, __: Any) -> None:
        assert (await one.say("Hello", "alice")).status_code == 200
        await told.wait()

    play(scene, exchange)


def test_without_the_ledger_a_gateway_tells_what_it_knows_and_that_it_is_not_all() -> None:
    async def exchange(gateway: str, counts: Counts) -> LedgerReply:
        raise TimeoutError

    async def scene(one: Nearby, two: Nearby, _: Any) -> None:
        for there in (one, two):
            assert (await there.say("Hello", "alice")).status_code == 200
        reply = (await one.get("/usage", "alice")).json()
        assert (reply["complete"], reply["data"][0]["requests"]) == (False, 1)

    play(scene, exchange)
