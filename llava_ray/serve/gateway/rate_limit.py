"""Rate limits and usage of each API key, as this gateway has counted them since it started.

`usage_ledger.py` adds what other gateways have counted.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_ray.config import KeyConfig
from llava_ray.errors import RateLimitError
from llava_ray.serve.usage import Usage

Clock = Callable[[], float]


@dataclass(slots=True)
class Totals:
    """Counts of requests and their tokens."""

    num_requests: int = 0
    num_errors: int = 0
    num_refused: int = 0
    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    num_completion_tokens: int = 0

    def count(self) -> Counter[str]:
        """Return the counts under their names in `/usage`; counts of several gateways add up."""
        return Counter(
            requests=self.num_requests,
            errors=self.num_errors,
            refused=self.num_refused,
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_completion_tokens,
            total_tokens=self.num_prompt_tokens + self.num_completion_tokens,
            image_tokens=self.num_image_tokens,
        )

    def add(self, used: Usage, *, is_error: bool) -> None:
        """Count a request that is over."""
        self.num_requests += 1
        self.num_errors += is_error
        self.num_prompt_tokens += used.num_prompt_tokens
        self.num_image_tokens += used.num_image_tokens
        self.num_completion_tokens += used.num_tokens


class Budget:
    """A token bucket: it starts full and is refilled evenly over its period.

    It may be overdrawn, because the tokens of an answer are only known once it is generated.

    Args:
        amount: its capacity, and what is refilled in one period.
        period_s: seconds.
        what: its unit in messages and headers: "requests" or "tokens".
    """

    def __init__(self, amount: int, period_s: float, what: str, clock: Clock) -> None:
        self.amount, self.period_s, self.what = amount, period_s, what
        self._clock, self._left, self._filled_at = clock, float(amount), clock()

    @property
    def left(self) -> float:
        now = self._clock()
        new = (now - self._filled_at) * self.amount / self.period_s
        self._left, self._filled_at = min(self._left + new, self.amount), now
        return self._left

    def wait_s(self, wanted: float) -> float:
        """Return the seconds until `wanted` is available; 0 if it is now."""
        return max(wanted - self.left, 0) * self.period_s / self.amount

    def take(self, amount: float) -> None:
        self._left = self.left - amount


class Account:
    """One API key: its budgets, its requests in flight and its usage."""

    def __init__(self, key: KeyConfig, *, clock: Clock = time.monotonic) -> None:
        self.key = key
        self.totals = Totals()
        self.num_in_flight = 0
        self._requests, self._tokens = [], []
        for budgets, amount, period_s, what in (
            (self._requests, key.requests_per_min, 60, "requests"),
            (self._tokens, key.tokens_per_min, 60, "tokens"),
            (self._tokens, key.tokens_per_day, 24 * 3600, "tokens"),
        ):
            if amount is not None:
                budgets.append(Budget(amount, period_s, what, clock))

    def begin(self) -> None:
        """Record the start of a request; the caller calls `end` when it has ended.

        Raises:
            RateLimitError: the key has reached a limit.
        """
        try:
            self._check()
        except RateLimitError:
            self.totals.num_refused += 1
            raise
        for budget in self._requests:
            budget.take(1)
        self.num_in_flight += 1

    def end(self, used: Usage, *, is_error: bool) -> None:
        """Record what a request has used, however it ended."""
        self.num_in_flight -= 1
        for budget in self._tokens:
            budget.take(used.num_prompt_tokens + used.num_tokens)
        self.totals.add(used, is_error=is_error)

    def charge_remote_usage(self, num_requests: int, num_tokens: int) -> None:
        """Subtract from the budgets what the key has used at other gateways."""
        for budgets, amount in ((self._requests, num_requests), (self._tokens, num_tokens)):
            for budget in budgets:
                budget.take(amount)

    def describe_limits(self) -> dict[str, str]:
        """Return OpenAI's `x-ratelimit-*` headers for the tightest budget of each kind."""
        headers = {}
        for budgets in (self._requests, self._tokens):
            if budgets:
                budget = min(budgets, key=lambda one: one.left)
                name = f"x-ratelimit-{{}}-{budget.what}"
                headers[name.format("limit")] = str(budget.amount)
                headers[name.format("remaining")] = str(max(math.floor(budget.left), 0))
                headers[name.format("reset")] = f"{math.ceil(budget.wait_s(budget.amount))}s"
        return headers

    def describe(self, elsewhere: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return this key's object in `/usage`; `in_flight` counts this gateway only.

        Args:
            elsewhere: counts of the other gateways, which are added.
        """
        used = self.totals.count()
        used.update(elsewhere or {})
        return {"key": self.key.name, "in_flight": self.num_in_flight, **used}

    def _check(self) -> None:
        most, name = self.key.max_in_flight, self.key.name
        if most is not None and self.num_in_flight >= most:
            raise RateLimitError(
                f"the API key {name!r} already has {most} requests in flight, its maximum: "
                "wait until one has ended"
            )
        for budget in (*self._requests, *self._tokens):
            if wait_s := budget.wait_s(1):
                period = "minute" if budget.period_s == 60 else "day"
                error = RateLimitError(
                    f"the API key {name!r} has used up its {budget.amount:,} {budget.what} per "
                    f"{period}: try again in {math.ceil(wait_s):,} s"
                )
                error.retry_after_s = wait_s
                raise error
