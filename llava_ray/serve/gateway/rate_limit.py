"""What each API key has used and may still use, as one gateway has seen it since it started.

What other gateways have seen comes from `ledger.py`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_ray.config import KeyConfig
from llava_ray.errors import RateLimitError
from llava_ray.types import Usage

Clock = Callable[[], float]


@dataclass(slots=True)
class Totals:
    """Counts of requests, and of their tokens."""

    num_requests: int = 0
    num_errors: int = 0
    num_refused: int = 0
    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    num_completion_tokens: int = 0

    def count(self) -> Counter[str]:
        """The counts under their names in `/usage`; those of several gateways can be added."""
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
    """A token bucket: full at first, refilled evenly over its period.

    It may be overdrawn, since the tokens of an answer are known when they are out.

    Args:
        amount: what it holds, and what comes in a period.
        period_s: seconds.
        what: of what, for messages and headers: "requests", "tokens".
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
        """Seconds until so much is there; 0 if it is."""
        return max(wanted - self.left, 0) * self.period_s / self.amount

    def take(self, amount: float) -> None:
        self._left = self.left - amount


class Account:
    """One key's budgets, what it has running, and its usage."""

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
        """Count a request that begins; `end` is called when it is over.

        Raises:
            RateLimitError: the key has used up what it may use for now.
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
        """Count what a request has used, whichever way it ended."""
        self.num_in_flight -= 1
        for budget in self._tokens:
            budget.take(used.num_prompt_tokens + used.num_tokens)
        self.totals.add(used, is_error=is_error)

    def take_elsewhere(self, num_requests: int, num_tokens: int) -> None:
        """Take from the budgets what the key has used at other gateways."""
        for budgets, amount in ((self._requests, num_requests), (self._tokens, num_tokens)):
            for budget in budgets:
                budget.take(amount)

    def describe_limits(self) -> dict[str, str]:
        """The headers of OpenAI's API that say what is left, of the tightest budget of a kind."""
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
        """The object of `/usage`, with what other gateways counted; in flight: here alone."""
        used = self.totals.count()
        used.update(elsewhere or {})
        return {"key": self.key.name, "in_flight": self.num_in_flight, **used}

    def _check(self) -> None:
        most, name = self.key.max_in_flight, self.key.name
        if most is not None and self.num_in_flight >= most:
            raise RateLimitError(
                f"the API key {name!r} has {most} requests running, as many as it may: "
                "wait until one has ended"
            )
        for budget in (*self._requests, *self._tokens):
            if wait_s := budget.wait_s(1):
                period = "minute" if budget.period_s == 60 else "day"
                error = RateLimitError(
                    f"the API key {name!r} has used up its {budget.amount:,} {budget.what} a "
                    f"{period}: try again in {math.ceil(wait_s):,} s"
                )
                error.retry_after_s = wait_s
                raise error
