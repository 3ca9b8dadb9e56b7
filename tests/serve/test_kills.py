"""kill -9 of a replica, a gateway and the page while clients stream: who sees it, what comes back.

Two gateways, the page, and two replicas of a model whose answers last until a test ends them.
"""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava_ray.config import ModelConfig, PageConfig, ServeConfig
from llava_ray.serve.backends.stream_transport import StreamAddress, StreamSenders
from llava_ray.types import ChatRequest, Chunk
from tests.support.local_page import PARAMETERS, Visitor, said, texts
from tests.support.wait import PATIENCE_S, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_CLIENTS = 8
SOON_S = 5
QUESTION = "Go on"
BROKEN = {"RemoteProtocolError", "ReadError"}
"""What httpx says of a connection that ends in the middle of an answer."""


def say(words: str) -> dict[str, Any]:
    return {"model": "lasting", "messages": [{"role": "user", "content": words}]}


@dataclass
class Deployed:
    """The applications, and a file whose presence ends all answers."""

    api: str
    page: str
    end: Path

    def find_pids(self, app: str, deployment: str) -> list[int]:
        from ray.serve.context import _get_global_client

        details: Any = _get_global_client().get_serve_details()
        replicas = details["applications"][app]["deployments"][deployment]["replicas"]
        return [one["pid"] for one in replicas if one["state"] == "RUNNING" and one["pid"]]


@pytest.fixture(scope="module")
def deployed(served: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    from ray import serve

    from llava_ray.serve.gateway.deployment import Gateway
    from llava_ray.serve.page import build_app

    end = tmp_path_factory.mktemp("kills") / "end"

    class Lasting:  # in here, so that Ray sends it to its workers by value
        def __init__(self) -> None:
            self._senders = StreamSenders()

        async def stats(self) -> dict[str, float]:
            return {}

        async def chat(self, request: ChatRequest, post: StreamAddress) -> AsyncIterator[Chunk]:
            async for chunk in self._senders.forward(self._talk(request), post):
                yield chunk

        async def _talk(self, request: ChatRequest) -> AsyncIterator[Chunk]:
            if request.messages[0].parts[0].text != QUESTION:
                yield Chunk("Hello", "stop", 1, 9, 0)
                return
            yield Chunk(f"{os.getpid()} ", None, 1, 9, 0)
            while not end.exists():
                await asyncio.sleep(0.05)
                yield Chunk("and ", None, 2, 9, 0)
            yield Chunk("end", "stop", 3, 9, 0)

    options: dict[str, Any] = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.05}}
    options["max_ongoing_requests"] = 100
    model = serve.deployment(name="lasting", health_check_period_s=2, **options)(Lasting)
    gateway = serve.deployment(name="gateway", health_check_period_s=2, **options)(Gateway)
    config = ServeConfig(models=[ModelConfig(path="lasting", engine="echo")], page=False)
    bound = gateway.bind(config, {"lasting": model.bind()})
    serve.run(bound, name="kills", route_prefix="/kills")
    page = PageConfig(gateway_url=f"{served}/kills")
    serve.run(build_app(page), name="kills-page", route_prefix="/kills-page")
    yield Deployed(f"{served}/kills", f"{served}/kills-page", end)
    serve.delete("kills-page")
    serve.delete("kills")


@dataclass
class Client:
    """A client that reads one answer until it ends.

    Attributes:
        replica: id of the process that answers.
        outcome: how the answer ended: "end", the code of an error, or the name of an exception.
        ended_at: when it ended, by `time.monotonic`.
    """

    listen: Callable[["Client"], str]
    has_begun: threading.Event = field(default_factory=threading.Event)
    replica: int = 0
    outcome: str = ""
    ended_at: float = 0.0

    def run(self) -> None:
        try:
            self.outcome = self.listen(self)
        except (httpx.HTTPError, RuntimeError) as error:
            self.outcome = type(error).__name__
        self.ended_at = time.monotonic()
        self.has_begun.set()


def ask_gateway(deployed: Deployed) -> Callable[[Client], str]:
    def listen(client: Client) -> str:
        url, said_last = f"{deployed.api}/v1/chat/completions", ""
        body = say(QUESTION) | {"stream": True}
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as reply:
            for line in reply.iter_lines():
                event = (
                    json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                )
                if "error" in event:
                    return event["error"]["code"]
                for choice in event.get("choices", ()):
                    said_last = choice["delta"].get("content") or said_last
                if said_last and not client.has_begun.is_set():
                    client.replica = int(said_last)
                    client.has_begun.set()
        return said_last

    return listen


def ask_page(deployed: Deployed) -> Callable[[Client], str]:
    def listen(client: Client) -> str:
        shown = ""
        call = ("answer", [said(QUESTION)], [], "lasting", "", False, *PARAMETERS)
        for chat, _ in Visitor(deployed.page).run(*call):
            shown = texts(chat)[1]
            if shown.count(" ") > 1:
                client.has_begun.set()
        return shown.rpartition(" ")[2]

    return listen


class ClientGroup:
    """Clients that read streams at the same time; all streams have begun after `__init__`."""

    def __init__(self, deployed: Deployed, listen: Callable[[Client], str]) -> None:
        self.clients = [Client(listen) for _ in range(NUM_CLIENTS)]
        self._place = deployed
        deployed.end.unlink(missing_ok=True)
        self._threads = ThreadPoolExecutor(NUM_CLIENTS)
        for client in self.clients:
            self._threads.submit(client.run)
            assert client.has_begun.wait(PATIENCE_S)
            assert not client.outcome, client.outcome

    def let_end(self) -> None:
        """End the remaining answers, and wait for all clients."""
        self._place.end.touch()
        self._threads.shutdown()


def kill(pid: int) -> float:
    """Kill a process with SIGKILL; return the time."""
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def wait_until_well(deployed: Deployed) -> None:
    """Wait until a request is answered normally and all processes run again."""
    parts = [("kills", "lasting", 2), ("kills", "gateway", 2), ("kills-page", "page", 1)]

    def is_well() -> bool:
        with suppress(httpx.HTTPError):
            url = f"{deployed.api}/v1/chat/completions"
            asked = httpx.post(url, json=say("Hello"), timeout=PATIENCE_S)
            seen = httpx.get(f"{deployed.page}/config", timeout=PATIENCE_S)
            return (asked.status_code, seen.status_code) == (200, 200)
        return False

    wait_until(is_well, "requests are answered")
    for app, deployment, count in parts:
        wait_until(
            lambda: len(deployed.find_pids(app, deployment)) == count,  # noqa: B023
            f"{count} replicas of {deployment} run",
        )
    assert is_well()


def test_a_replica_that_is_killed_is_told_to_those_whom_it_answered_alone(
    deployed: Deployed,
) -> None:
    group = ClientGroup(deployed, ask_gateway(deployed))
    victim = group.clients[0].replica
    killed_at = kill(victim)
    hit = [client for client in group.clients if client.replica == victim]
    wait_until(lambda: all(client.outcome for client in hit), "who is hit has an error")
    group.let_end()
    assert {client.outcome for client in hit} == {"engine_error"}
    assert max(client.ended_at for client in hit) < killed_at + SOON_S
    spared = [client.outcome for client in group.clients if client not in hit]
    assert spared
    assert set(spared) == {"end"}
    wait_until_well(deployed)


def test_a_gateway_that_is_killed_breaks_its_own_connections_alone(deployed: Deployed) -> None:
    group = ClientGroup(deployed, ask_gateway(deployed))
    killed_at = kill(deployed.find_pids("kills", "gateway")[0])
    wait_until(lambda: any(client.outcome for client in group.clients), "somebody has an error")
    group.let_end()
    outcomes = {client.outcome for client in group.clients}
    assert "end" in outcomes
    assert outcomes - {"end"} <= BROKEN
    hit = [client for client in group.clients if client.outcome != "end"]
    assert max(client.ended_at for client in hit) < killed_at + SOON_S
    wait_until_well(deployed)


def test_a_page_that_is_killed_breaks_the_answers_that_it_shows_alone(deployed: Deployed) -> None:
    visitors = ClientGroup(deployed, ask_page(deployed))
    callers = ClientGroup(deployed, ask_gateway(deployed))
    killed_at = kill(deployed.find_pids("kills-page", "page")[0])
    wait_until(lambda: all(one.outcome for one in visitors.clients), "visitors have an error")
    assert max(one.ended_at for one in visitors.clients) < killed_at + SOON_S
    callers.let_end()
    visitors.let_end()
    assert {client.outcome for client in visitors.clients} <= BROKEN
    assert {client.outcome for client in callers.clients} == {"end"}
    wait_until_well(deployed)
