"""Clients that stream answers continuously, and a record of how each of their requests ended."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

PATH = "/v1/chat/completions"


@dataclass
class Ask:
    """One request of a client.

    Attributes:
        end: "done" (the answer is complete), "error" (the stream ended with an error event),
            "refused" (the response is an error), "cut" (the connection broke).
        status: HTTP status of the response; 0 if there was none.
    """

    started_at: float
    end: str = "cut"
    status: int = 0
    why: str = ""
    retry_after: str | None = None
    num_words: int = 0
    last_word_at: float = 0.0
    ended_at: float = 0.0
    host: str = ""

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


@dataclass
class LoadRecord:
    """All requests of some clients, and how they ended."""

    asks: list[Ask] = field(default_factory=list)
    num_started: int = 0

    def count(self) -> Counter[str]:
        return Counter(ask.end for ask in self.asks)

    def since(self, moment: float) -> "LoadRecord":
        """Return the requests that began at or after this time of `time.monotonic`."""
        return LoadRecord([ask for ask in self.asks if ask.started_at >= moment])


async def ask(client: httpx.AsyncClient, record: LoadRecord, *, model: str, max_tokens: int) -> Ask:
    """Send one request, and record how it ended."""
    record.num_started += 1
    one = Ask(time.monotonic())
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "on and on"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    try:
        async with client.stream("POST", PATH, json=body) as response:
            one.status, one.retry_after = response.status_code, response.headers.get("retry-after")
            if response.status_code == 200:
                await _listen(response, one)
            else:
                error = json.loads(await response.aread())["error"]
                one.end, one.why = "refused", f"{error['code']}: {error['message']}"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        one.why = f"{type(error).__name__}: {error}"
    finally:
        one.ended_at = time.monotonic()
        record.asks.append(one)
    return one


async def _listen(response: httpx.Response, one: Ask) -> None:
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            one.end = "done"
            continue
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            one.end, one.why = "error", f"{event['error']['code']}: {event['error']['message']}"
        elif event["choices"] and (text := event["choices"][0]["delta"].get("content")):
            one.num_words += len(text.split())
            one.last_word_at = time.monotonic()


@asynccontextmanager
async def run_clients(
    url: str, *, num_clients: int, model: str = "echo", max_tokens: int = 60
) -> AsyncIterator[LoadRecord]:
    """Run clients that send one request after the other until the block ends.

    Requests that are running then are awaited.
    """
    record, is_over = LoadRecord(), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=120, limits=limits, trust_env=False
    ) as client:

        async def keep_asking() -> None:
            while not is_over.is_set():
                one = await ask(client, record, model=model, max_tokens=max_tokens)
                if one.end == "refused":
                    await asyncio.sleep(0.2)

        clients = [asyncio.create_task(keep_asking()) for _ in range(num_clients)]
        try:
            yield record
        finally:
            is_over.set()
            await asyncio.gather(*clients)
