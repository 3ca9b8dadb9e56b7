"""`LLaVA` on the embedded model: answers, streams, many at once, and what mistakes say."""

import asyncio
import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_ray import LLaVA
from llava_ray.demo import make_example
from llava_ray.errors import ConfigError, ImageError, RequestError, UserError
from llava_ray.types import Message, TextPart

QUESTION = "How many objects are there?"


@pytest.fixture(scope="module")
def model() -> Iterator[LLaVA]:
    with LLaVA("demo", max_batch_size=8, cache_tokens=4096) as model:
        yield model


@pytest.fixture(scope="module")
def echo() -> Iterator[LLaVA]:
    with LLaVA("echo", engine="echo") as model:
        yield model


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return make_example(7)[0]


@pytest.fixture(scope="module")
def scene_file(scene: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    scene.save(path)
    return path


@pytest.fixture(scope="module")
def answer(model: LLaVA, scene_file: Path) -> str:
    return model.chat(QUESTION, images=[str(scene_file)])


def test_a_question_about_an_image_is_answered(answer: str) -> None:
    assert answer == "Four."


def test_an_image_may_be_a_path_bytes_a_data_url_or_a_pil_image(
    model: LLaVA, scene: Image.Image, scene_file: Path, answer: str
) -> None:
    data = scene_file.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for image in (scene_file, data, scene, url):
        assert model.chat(QUESTION, images=image) == answer


def test_a_stream_gives_the_same_answer_in_pieces(model: LLaVA, scene: Image.Image) -> None:
    options: dict[str, Any] = {"images": [scene], "max_tokens": 12}
    pieces = list(model.chat("Describe the picture.", stream=True, **options))
    assert len(pieces) > 1
    assert "".join(pieces) == model.chat("Describe the picture.", **options)


def test_the_chunks_have_what_the_engine_knows(model: LLaVA, scene: Image.Image) -> None:
    chunks = list(model.stream_chunks(QUESTION, scene, num_logprobs=2))
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].num_image_tokens > 0
    assert chunks[0].logprobs


def test_a_stream_that_is_left_is_aborted_in_the_engine(model: LLaVA, scene: Image.Image) -> None:
    stream = model.chat("Describe the picture.", scene, stream=True, ignore_eos=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert model.chat(QUESTION, scene) == "Four."
    assert model.engine.stats()["num_running"] == 0


def test_it_works_inside_a_running_event_loop(
    model: LLaVA, scene: Image.Image, answer: str
) -> None:
    async def ask() -> str:
        return model.chat(QUESTION, scene)

    assert asyncio.run(ask()) == answer


def test_many_are_answered_in_their_order(
    model: LLaVA, scene: Image.Image, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [(QUESTION, scene), {"text": QUESTION, "images": [scene], "max_tokens": 1}, "Hello"]
    answers = model.chat_many(items * 4)
    assert answers[0] == answer
    assert answers == answers[:3] * 4
    assert "12/12" in capsys.readouterr().err
    assert model.chat_many([]) == []


def test_a_failing_item_is_named_or_stands_in_the_answers_place(echo: LLaVA) -> None:
    items = ["a", ("b", ["/nowhere.png"]), "c"]
    with pytest.raises(ImageError, match=r"items\[1\]: cannot read the image '/nowhere.png'"):
        echo.chat_many(items, progress=False)
    first, failed, last = echo.chat_many(items, progress=False, errors="return")
    assert (first, last) == ("a (0 images)", "c (0 images)")
    assert isinstance(failed, ImageError)
    with pytest.raises(RequestError, match=r"items\[0\].*did you mean images"):
        echo.chat_many([{"text": "a", "image": "b.png"}])
    with pytest.raises(RequestError, match=r"items\[1\] is a int"):
        echo.chat_many(["a", 1])


def test_a_conversation_goes_on_from_pairs_or_messages(
    model: LLaVA, scene: Image.Image, answer: str
) -> None:
    part = [{"type": "image", "image": scene}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": part}, {"role": "assistant", "content": answer}]
    asked = "Is the heart blue?"
    said = model.chat(asked, history=[((QUESTION, scene), answer)])
    assert said == model.chat(asked, history=turns)
    assert said == model.chat(messages=[*turns, Message("user", (TextPart(asked),))])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": "nowhere.png"}, "cannot read the image 'nowhere.png'"),
        ({"images": __file__}, f"{__file__}: this is not an image"),
        ({"images": "https://example.org/a.png"}, "download the file"),
        ({"images": [1]}, r"images\[0\] is a int: give a path"),
        ({"max_token": 3}, "did you mean max_tokens"),
        ({"temperature": -1}, "temperature: .*greater than or equal to 0"),
        ({"history": ["hello"]}, "history holds a str"),
        ({"messages": [{"role": "user", "content": "x"}]}, "leave text, images"),
        ({"text": ""}, "nothing to answer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_said_with_its_remedy(echo: LLaVA, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        echo.chat(**{"text": "x", **options})


def test_unknown_options_are_refused_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean context_length"):
        LLaVA("demo", context_lenght=512)
    with pytest.raises(ConfigError, match="did you mean vision_tower"):
        LLaVA("demo", vision_towers="x")
    with pytest.raises(ConfigError, match="max_batch_size"):
        LLaVA("demo", max_batch_size=0)
    with pytest.raises(ConfigError, match="base can be given for the torch engine only"):
        LLaVA("demo", engine="echo", base="x")
    with pytest.raises(ConfigError, match="leave base out"):
        LLaVA("demo", base="demo")


def test_a_closed_model_says_so() -> None:
    model = LLaVA("echo", engine="echo")
    assert repr(model) == "LLaVA('echo', engine='echo')"
    model.close()
    model.close()
    assert "closed" in repr(model)
    for ask in (model.chat, lambda text: model.chat(text, stream=True), model.chat_many):
        with pytest.raises(UserError, match="is closed: load it again"):
            ask("x")


def test_two_lines_are_a_program_that_ends(scene_file: Path) -> None:
    code = (
        "from llava_ray import LLaVA\n"
        f'print(LLaVA("demo").chat("{QUESTION}", images=["{scene_file}"]))'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Four.\n", "")
