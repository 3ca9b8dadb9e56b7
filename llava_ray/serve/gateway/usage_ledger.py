"""What the keys have used at all gateways of an application together, kept while these come and go.

    AccessControl.end -> SharedUsage.sync_soon -> UsageLedger.exchange (an actor) -> LedgerReply

The actor belongs to no application: it lives as long as the cluster. A gateway tells it all that it
has counted since it started, so that a call that is lost or comes twice changes nothing.
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
"""For each key's name what it has used; see `Totals.describe`."""

SYNC_DELAY_S = 1.0  # between two exchanges; what a gateway counts in it is lost if it dies
_PATIENCE_S = 3.0


class LedgerReply(NamedTuple):
    """What the ledger tells a gateway.

    Attributes:
        since: when it was opened, in seconds since 1970.
        others: what all other gateways have counted since then.
    """

    since: int
    others: Counts


ExchangeCounts = Callable[[str, Counts], Awaitable[LedgerReply]]


class UsageLedger:
    """The actor."""

    def __init__(self) -> None:
        self._since = int(time.time())
        self._pages: dict[str, Counts] = {}

    def exchange(self, gateway: str, counts: Counts) -> LedgerReply:
        """Write down what a gateway has counted since it started."""
        self._pages[gateway] = counts
        others: Counts = {}
        for name, page in self._pages.items():
            for key, used in page.items() if name != gateway else ():
                others[key] = others.get(key, Counter()) + used
        return LedgerReply(self._since, others)


def open_ledger(application: str) -> ExchangeCounts:
    """Return how to reach the ledger of a Serve application; the first gateway opens it.

    It starts at once, while the models load, and not with the first request.
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
        return await asyncio.wait_for(answer, _PATIENCE_S)

    return exchange


class SharedUsage:
    """The accounts of one gateway, and what other gateways have counted for the same keys.

    What others let through is taken from the budgets here as well, a moment later.

    Args:
        accounts: this gateway's.
        exchange: reaches the ledger; None: there are no others.
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
            told = await self._exchange(self._gateway, counts)
        except (RayError, TimeoutError) as error:
            log.logger.warning(f"the ledger of usage does not answer: {type(error).__name__}")
            return False
        before, self._since, self._others = self._others, told.since, told.others
        if before is not None:  # what was used before this gateway came is not charged again
            for account in self._accounts:
                name = account.key.name
                new = Counter(told.others.get(name, {}))
                new.subtract(before.get(name, {}))
                account.take_elsewhere(new["requests"], new["total_tokens"])
        return True
