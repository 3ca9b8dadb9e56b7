"""The page, driven as a browser drives it: over HTTP, in Serve, with the real gateway behind it."""

import asyncio
import io
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from endless import EndlessServer, run_endless_server
from gradio_client.utils import apply_diff
from PIL import Image

from llava_ray.client import LONGEST_SIDE, Client, shrink_picture
from llava_ray.errors import ImageError, ModelNotFoundError, UserError
from llava_ray.serve import conversation
from llava_ray.types import ChatRequest, Message, TextPart

PARAMETERS = (0.2, 0.7, 512)


class Visitor:
    """One visit to the page at an address, as its browser makes it."""

    def __init__(self, address: str, *, query: str = "") -> None:
        self._api = f"{address}/gradio_api"
        self._query = query
        self._session = uuid.uuid4().hex
        config = httpx.get(f"{address}/config").raise_for_status().json()
        self._events = {event["api_name"]: event["id"] for event in config["dependencies"]}
        self._running = ""

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        path = httpx.post(f"{self._api}/upload", files={"files": (name, data)}).json()[0]
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def run(self, name: str, *data: Any) -> Iterator[list[Any]]:
        """Start an event of the page and yield its outputs as they grow."""
        call = {"data": data, "fn_index": self._events[name], "session_hash": self._session}
        joined = httpx.post(f"{self._api}/queue/join?{self._query}", json=call).raise_for_status()
        self._running = joined.json()["event_id"]
        shown: list[Any] = []
        url = f"{self._api}/queue/data?session_hash={self._session}"
        with httpx.stream("GET", url, timeout=60) as told:
            for line in told.iter_lines():
                event = json.loads(line.removeprefix("data:") or "{}")
                if event.get("msg") == "process_completed" and not event["success"]:
                    raise RuntimeError(event["output"])
                new = event.get("output", {}).get("data")
                if event.get("msg") == "process_generating" and shown:
                    new = [apply_diff(old, diff) for old, diff in zip(shown, new, strict=True)]
                if new:
                    shown = new
                    yield shown

    def stop(self, name: str) -> None:
        call = {"session_hash": self._session, "event_id": self._running}
        call["fn_index"] = self._events[name]
        httpx.post(f"{self._api}/cancel", json=call).raise_for_status()

    def answer(self, chat: list[Any], *, model: str = "echo") -> list[list[str]]:
        """All that the chat showed, one after the other, as texts."""
        views = self.run("answer", chat, model, *PARAMETERS)
        return [texts(chat) for (chat,) in views]


class Aside(NamedTuple):
    """The page as an application of its own, for a gateway whose answers never end."""

    address: str
    gateway: EndlessServer


@pytest.fixture(scope="module")
def aside(served: str) -> Iterator[Aside]:
    from ray import serve

    from llava_ray.serve.page import PageConfig, build_app

    with run_endless_server() as gateway:
        config = PageConfig(gateway_url=gateway.url)
        serve.run(build_app(config), name="page", route_prefix="/talk")
        yield Aside(f"{served}/talk", gateway)
        serve.delete("page")


def said(text: str, *pictures: dict[str, Any], role: str = "user") -> dict[str, Any]:
    """A message of the chat, as the browser holds it."""
    files = [{"type": "file", "file": picture} for picture in pictures]
    return {"role": role, "content": [*files, {"type": "text", "text": text}]}


def texts(chat: list[dict[str, Any]]) -> list[str]:
    return [part["text"] for message in chat for part in message["content"] if "text" in part]


def red_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(file, "PNG")
    return file.getvalue()


def test_the_page_asks_nothing_of_other_hosts(served: str) -> None:
    html = httpx.get(served + "/").text
    assert "LLaVA" in html
    tags = re.findall(r"<(?:script|link|img)[^>]+>", html)
    assert tags
    assert not [tag for tag in tags if re.search(r"(src|href)=.(https?:)?//", tag)]
    assert not re.search(r"@import|url\(.?http", httpx.get(served + "/theme.css").text)


def test_an_answer_grows_and_ends_with_its_figures(served: str) -> None:
    views = Visitor(served).answer([said("word " * 400)])
    lengths = [len(view[1]) for view in views]
    assert len(set(lengths)) >= 3
    assert lengths == sorted(lengths)
    assert re.search(r">402 tokens · \d+\.\d s · 402 in the prompt<", views[-1][2])


def test_pictures_of_all_turns_reach_the_model(served: str) -> None:
    visitor = Visitor(served)
    red = visitor.upload("red.png", red_png())
    chat = [said("One.", red), said("I see.", role="assistant"), said("And these?", red, red)]
    assert "And these? (3 pictures)" in visitor.answer(chat)[-1]


def test_an_error_shows_its_cause_and_the_request_id(served: str) -> None:
    told = Visitor(served).answer([said("Hello")], model="nope")[-1][-1]
    assert "there is no model &#x27;nope&#x27; here; there is echo, other" in told
    assert re.search(r"\[request page-[0-9a-f]{32}\]", told)


def test_a_file_that_is_no_picture_is_named(served: str) -> None:
    visitor = Visitor(served)
    poem = visitor.upload("poem.png", b"Roses are red")
    assert "poem.png: this is not a picture" in visitor.answer([said("?", poem)])[-1][-1]


def test_a_file_that_was_not_uploaded_is_not_read(served: str) -> None:
    file = {"path": str(Path(__file__).absolute()), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(RuntimeError, match="not uploaded"):
        Visitor(served).answer([said("?", file)])


def test_models_are_listed_and_the_address_chooses_one(served: str) -> None:
    ((chosen, knows, problems),) = Visitor(served).run("load")
    assert (chosen["choices"], chosen["value"]) == ([["echo", "echo"], ["other", "other"]], "echo")
    assert (knows, problems) == ("", [])
    for asked, expected in (("other", "other"), ("nope", "echo")):
        ((chosen, _, _),) = Visitor(served, query=f"model={asked}").run("load")
        assert chosen["value"] == expected


def test_a_page_of_its_own_draws_scenes_with_questions_under_its_prefix(aside: Aside) -> None:
    ((box, *chips),) = Visitor(aside.address).run("draw")
    url = box["files"][0]["url"]
    assert url.startswith(f"{aside.address}/gradio_api/file=")
    assert Image.open(io.BytesIO(httpx.get(url).content)).size == (432, 432)
    assert chips[0]["value"] == "Describe the picture."


def test_stop_closes_the_stream_at_the_gateway(aside: Aside) -> None:
    visitor = Visitor(aside.address)
    aside.gateway.abandoned.clear()
    for (chat,) in visitor.run("answer", [said("Go on")], "endless", *PARAMETERS):
        if "on and" in texts(chat)[-1]:
            break
    assert not aside.gateway.abandoned.is_set()
    visitor.stop("answer")
    assert aside.gateway.abandoned.wait(10)


def test_a_visitor_who_leaves_stops_the_answer(aside: Aside) -> None:
    aside.gateway.abandoned.clear()
    views = Visitor(aside.address).run("answer", [said("Go on")], "endless", *PARAMETERS)
    next(views)
    assert not aside.gateway.abandoned.is_set()
    views.close()
    assert aside.gateway.abandoned.wait(20)


def test_a_question_without_an_answer_is_not_sent_again() -> None:
    chat = [
        said("Bad"),
        conversation.show_error(UserError("it failed")),
        said("Good"),
        said("Fine.", role="assistant"),
        conversation.note("2 tokens"),
        said("Next"),
    ]
    assert conversation.read_history(chat) == (
        Message("user", (TextPart("Good"),)),
        Message("assistant", (TextPart("Fine."),)),
        Message("user", (TextPart("Next"),)),
    )
    assert conversation.rewind(chat[:5]) == chat[:3]


def test_a_large_photo_is_scaled_down_and_a_small_picture_sent_as_it_is() -> None:
    noise = Image.effect_noise((3000, 2250), 90).convert("RGB")
    photo, small = io.BytesIO(), io.BytesIO()
    noise.save(photo, "JPEG", quality=100)
    noise.resize((200, 150)).save(small, "PNG")
    assert photo.tell() > 4 << 20
    shrunk = Image.open(io.BytesIO(shrink_picture(photo.getvalue(), name="photo")))
    assert shrunk.size == (LONGEST_SIDE, LONGEST_SIDE * 3 // 4)
    assert shrink_picture(small.getvalue(), name="small") == small.getvalue()
    with pytest.raises(ImageError, match=r"half\.jpg: the picture is damaged"):
        shrink_picture(photo.getvalue()[:1000], name="half.jpg")


def test_the_client_makes_our_errors_of_the_servers(served: str) -> None:
    async def fail() -> None:
        async with Client(served) as client:
            assert await client.is_up()
            request = ChatRequest("mine-1", "nope", (Message("user", (TextPart("Hi"),)),))
            with pytest.raises(ModelNotFoundError, match=r"\[request mine-1\]") as told:
                _ = [chunk async for chunk in client.stream(request)]
            assert told.value.param == "model"
        async with Client("http://127.0.0.1:9") as client:
            assert not await client.is_up()
            with pytest.raises(UserError, match="no server answers"):
                await client.list_models()

    asyncio.run(fail())
