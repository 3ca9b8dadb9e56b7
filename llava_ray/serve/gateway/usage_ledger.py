"""The usage ledger: what each API key has used at all gateways together, kept across restarts.

    AccessControl.end -> SharedUsage.sync_soon -> UsageLedger.exchange (an actor) -> LedgerReply

The ledger is a detached actor that lives as long as the cluster. A gateway always reports its
totals since it started, so a report that is lost or arrives twice does no harm.
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from llava_ray.serve import log
from llava_ray.serve.gateway.rate_limit import Account

Counts = dict[str, Counter[str]]
"""For each key's name what it has used; see `Totals.count`."""

SYNC_DELAY_S = 1.0  # between two exchanges; if a gateway dies, it loses at most this much
_TIMEOUT_S = 3.0


class LedgerReply(NamedTuple):
    """The ledger's answer to a gateway.

    Attributes:
        since: when the ledger was created, in seconds since 1970.
        others: what the other gateways have counted since then.
    """

    since: int
    others: Counts


ExchangeCounts = Callable[[str, Counts], Awaitable[LedgerReply]]


class UsageLedger:
    """The actor that adds up the counts of all gateways."""

    def __init__(self) -> None:
        self._since = int(time.time())
        self._by_gateway: dict[str, Counts] = {}

    def exchange(self, gateway: str, counts: Counts) -> LedgerReply:
        """Store what a gateway has counted since it started; return what the others have."""
        self._by_gateway[gateway] = counts
        others: Counts = {}
        for name, counted in self._by_gateway.items():
            for key, used in counted.items() if name != gateway else ():
                others[key] = others.get(key, Counter()) + used
        return LedgerReply(self._since, others)


def open_ledger(application: str) -> ExchangeCounts:
    """Return a function that exchanges counts with the ledger of a Serve application.

    The first gateway creates the ledger, at once, so that it is ready when the models are loaded.
    """
    remote: Any = ray.remote(UsageLedger)
    actor = remote.options(
        name=f"usage of {application}",
        namespace="llava-ray",
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
    )
    actor.remote()

    async def exchange(gateway: str, counts: Counts) -> LedgerReply:
        answer = actor.remote().exchange.remote(gateway, counts)
        return await asyncio.wait_for(answer, _TIMEOUT_S)

    return exchange


class SharedUsage:
    """The accounts of one gateway, kept in step with the other gateways through the ledger.

    What other gateways admit is subtracted from the budgets here too, about a second later.

    Args:
        accounts: this gateway's.
        exchange: reaches the ledger; None: there are no other gateways.
    """

    def __init__(self, accounts: Sequence[Account], exchange: ExchangeCounts | None) -> None:
        self._accounts, self._exchange = accounts, exchange
        self._gateway = uuid.uuid4().hex
        self._since = int(time.time())
        self._others: Counts | None = None
        self._next: asyncio.Task[None] | None = None

    def sync_soon(self) -> None:
        """ExchangeCounts counts in a moment; many calls are one exchange."""
        if self._exchange and (self._next is None or self._next.done()):
            self._next = asyncio.create_task(self._sync_later())

    async def describe(self, accounts: Sequence[Account]) -> dict[str, Any]:
        """Return the body of `/usage` for some of the accounts."""
        is_complete = await self._sync()
        others = self._others or {}
        usage = [account.describe(others.get(account.key.name)) for account in accounts]
        return {"object": "list", "since": self._since, "complete": is_complete, "data": usage}

    async def _sync_later(self) -> None:
        await asyncio.sleep(SYNC_DELAY_S)
        await self._sync()

    async def _sync(self) -> bool:
        """ExchangeCounts counts; return whether those of all gateways are known now."""
        if self._exchange is None:
            return True
        counts = {account.key.name: account.totals.count() for account in self._accounts}
        try:
            reply = await self._exchange(self._gateway, counts)
        except (RayError, TimeoutError) as error:
            log.logger.warning(f"the usage ledger does not respond: {type(error).__name__}")
            return False
        before, self._since, self._others = self._others, reply.since, reply.others
        if before is not None:  # usage from before this gateway started is not charged
            for account in self._accounts:
                name = account.key.name
                new = Counter(reply.others.get(name, {}))
                new.subtract(before.get(name, {}))
                account.charge_remote_usage(new["requests"], new["total_tokens"])
        return True
