"""The page, used over HTTP as a browser does, in Serve, with the real gateway."""

import asyncio
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from PIL import Image

from llava_ray.client import LONGEST_SIDE, Client, shrink_image
from llava_ray.config import PageConfig
from llava_ray.errors import ImageError, ModelNotFoundError, UserError
from llava_ray.serve.page import conversation
from llava_ray.types import ChatRequest, Message, TextPart
from tests.support.endless_openai import EndlessServer, run_endless_server
from tests.support.local_page import PARAMETERS, Visitor, red_png, said, texts
from tests.support.wait import PATIENCE_S

pytestmark = pytest.mark.ray


class Aside(NamedTuple):
    """The page as an application of its own, for a gateway whose answers never end."""

    address: str
    gateway: EndlessServer


@pytest.fixture(scope="module")
def aside(served: str) -> Iterator[Aside]:
    from ray import serve

    from llava_ray.serve.page import build_app

    with run_endless_server() as gateway:
        config = PageConfig(gateway_url=gateway.url)
        serve.run(build_app(config), name="page", route_prefix="/talk")
        yield Aside(f"{served}/talk", gateway)
        serve.delete("page")


def test_the_page_asks_nothing_of_other_hosts(served: str) -> None:
    html = httpx.get(served + "/", timeout=PATIENCE_S).text
    assert "LLaVA" in html
    tags = re.findall(r"<(?:script|link|img)[^>]+>", html)
    assert tags
    assert not [tag for tag in tags if re.search(r"(src|href)=.(https?:)?//", tag)]
    css = httpx.get(served + "/theme.css", timeout=PATIENCE_S).text
    assert not re.search(r"@import|url\(.?http", css)


def test_an_answer_grows_and_ends_with_its_figures(served: str) -> None:
    views = Visitor(served).answer([said("word " * 400)], model="other")
    lengths = [len(view[1]) for view in views]
    assert len(set(lengths)) >= 3
    assert lengths == sorted(lengths)
    assert re.search(r">402 tokens · \d+\.\d s · 402 in the prompt<", views[-1][2])


def test_images_of_all_turns_reach_the_model(served: str) -> None:
    visitor = Visitor(served)
    red = visitor.upload("red.png", red_png())
    chat = [said("One.", red), said("I see.", role="assistant"), said("And these?", red, red)]
    assert "And these? (3 images)" in visitor.answer(chat)[-1]


def test_an_error_shows_its_cause_and_the_request_id(served: str) -> None:
    told = Visitor(served).answer([said("Hello")], model="nope")[-1][-1]
    assert "unknown model &#x27;nope&#x27;: use one of echo, other" in told
    assert re.search(r"\[request page-[0-9a-f]{32}\]", told)


def test_a_file_that_is_no_image_is_named(served: str) -> None:
    visitor = Visitor(served)
    poem = visitor.upload("poem.png", b"Roses are red")
    assert "poem.png: this is not an image" in visitor.answer([said("?", poem)])[-1][-1]


def test_a_file_that_was_not_uploaded_is_not_read(served: str) -> None:
    file = {"path": str(Path(__file__).absolute()), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(RuntimeError, match="not uploaded"):
        Visitor(served).answer([said("?", file)])


def test_models_are_listed_and_the_address_chooses_one(served: str) -> None:
    ((chosen, other, knows, problems),) = Visitor(served).run("load")
    assert (other["choices"], other["value"]) == (chosen["choices"], "other")
    assert (chosen["choices"], chosen["value"]) == ([["echo", "echo"], ["other", "other"]], "echo")
    assert not knows["visible"]
    assert "value" not in problems
    for asked, expected in (("other", "other"), ("nope", "echo")):
        ((chosen, *_),) = Visitor(served, query=f"model={asked}").run("load")
        assert chosen["value"] == expected


def test_a_page_of_its_own_draws_scenes_with_questions_under_its_prefix(aside: Aside) -> None:
    ((box, *chips),) = Visitor(aside.address).run("draw")
    url = box["files"][0]["url"]
    assert url.startswith(f"{aside.address}/gradio_api/file=")
    drawn = httpx.get(url, timeout=PATIENCE_S).content
    assert Image.open(io.BytesIO(drawn)).size == (432, 432)
    assert chips[0]["value"] == "Describe the picture."


def test_stop_closes_the_stream_at_the_gateway(aside: Aside) -> None:
    visitor = Visitor(aside.address)
    aside.gateway.abandoned.clear()
    for chat, _ in visitor.run("answer", [said("Go on")], [], "endless", "", False, *PARAMETERS):
        if "on and" in texts(chat)[-1]:
            break
    assert not aside.gateway.abandoned.is_set()
    visitor.stop("answer")
    assert aside.gateway.abandoned.wait(PATIENCE_S)


def test_a_visitor_who_leaves_stops_the_answer(aside: Aside) -> None:
    aside.gateway.abandoned.clear()
    question = [said("Go on")]
    views = Visitor(aside.address).run("answer", question, [], "endless", "", False, *PARAMETERS)
    next(views)
    assert not aside.gateway.abandoned.is_set()
    views.close()
    assert aside.gateway.abandoned.wait(PATIENCE_S)


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


def test_a_large_photo_is_scaled_down_and_a_small_image_sent_as_it_is() -> None:
    noise = Image.effect_noise((3000, 2250), 90).convert("RGB")
    photo, small = io.BytesIO(), io.BytesIO()
    noise.save(photo, "JPEG", quality=100)
    noise.resize((200, 150)).save(small, "PNG")
    assert photo.tell() > 4 << 20
    shrunk = Image.open(io.BytesIO(shrink_image(photo.getvalue(), name="photo")))
    assert shrunk.size == (LONGEST_SIDE, LONGEST_SIDE * 3 // 4)
    assert shrink_image(small.getvalue(), name="small") == small.getvalue()
    with pytest.raises(ImageError, match=r"half\.jpg: the image is damaged"):
        shrink_image(photo.getvalue()[:1000], name="half.jpg")


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
