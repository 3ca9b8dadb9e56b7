"""Plain completions and tokens: what is read, what is refused, what the engines make of it."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from pydantic import ValidationError

from llava_ray.config import LimitsConfig
from llava_ray.engine.chat import chat, complete, tokenize
from llava_ray.engine.echo import EchoEngine
from llava_ray.errors import ContextLengthError, RequestError, UnsupportedError
from llava_ray.serve.openai.completions import parse_completion, parse_detokenize, parse_tokenize
from llava_ray.serve.openai.protocol import DetokenizeBody
from llava_ray.types import (
    ChatRequest,
    Chunk,
    CompletionRequest,
    ImagePart,
    Message,
    Prompt,
    Sampling,
    TextPart,
    TokenizeRequest,
)
from tests.support.engine_requests import answer, load, prompt
from tests.support.tiny_checkpoint import make_image

LIMITS = LimitsConfig(max_answers=6)
GREEDY = Sampling(temperature=0, max_tokens=12)


def read(**fields: Any) -> Any:
    body = json.dumps({"model": "m", "prompt": "Once", **fields}).encode()
    return parse_completion(body, limits=LIMITS, request_id="cmpl-1")


async def say(engine, *prompts: str | tuple[int, ...], **options: Any) -> dict[int, str]:
    request = CompletionRequest("cmpl-1", "m", prompts, **{"sampling": GREEDY} | options)
    texts: dict[int, str] = {}
    async for chunk in complete(engine, request):
        texts[chunk.answer] = texts.get(chunk.answer, "") + chunk.text
    return dict(sorted(texts.items()))


# ---- what is read ----


def test_a_prompt_is_a_text_or_tokens_or_several() -> None:
    assert read().request == CompletionRequest(
        "cmpl-1", "m", ("Once",), Sampling(max_tokens=16, may_cut=True)
    )
    assert read(prompt=["a", "b"]).request.prompts == ("a", "b")
    assert read(prompt=[1, 2]).request.prompts == ((1, 2),)
    assert read(prompt=[[1], [2, 3], "c"]).request.prompts == ((1,), (2, 3), "c")


def test_options_arrive() -> None:
    call = read(prompt=["a", "b"], n=3, best_of=3, logprobs=5, max_tokens=9, stream=True)
    assert (call.request.answers_each, call.request.num_answers) == (3, 6)
    assert (call.meta.answers_each, call.meta.num_answers) == (3, 6)
    assert call.request.sampling == Sampling(max_tokens=9, num_logprobs=5, may_cut=True)
    assert read(echo=True, suffix=None, user="ann").request.echo


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "a list of token ids"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [""]}, "prompt[0]", "is empty"),
        ({"prompt": ["a", 1]}, "prompt[1]", "a list of token ids"),
        ({"prompt": [1, -1]}, "prompt[0]", "a list of token ids"),
        ({"prompt": [[]]}, "prompt[0]", "a list of token ids"),
        ({"prompt": [True]}, "prompt[0]", "a list of token ids"),
        ({"prompt": {"text": "a"}}, "prompt", "a list of token ids"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": ["a"] * 7}, "prompt", "more than the 6 allowed"),
        ({"prompt": ["a"] * 4, "n": 2}, "prompt", "8 answers, 2 to each prompt, are more"),
        ({"logprobs": 6}, "logprobs", "from 0 to 5"),
        ({"logprobs": True}, "logprobs", "from 0 to 5"),
        ({"logprobs": 1, "echo": True}, "echo", "leave one of them out"),
    ],
)
def test_a_bad_field_is_named_with_the_remedy(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "end"), ("best_of", 2), ("response_format", {"type": "json_object"})],
)
def test_what_cannot_be_done_is_named(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read(**{field: value})
    assert caught.value.param == field


def test_checking_a_list_of_tokens_stops_at_the_first_that_is_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        DetokenizeBody.model_validate({"tokens": [1, *["x"] * 1000]})
    assert [error["loc"] for error in caught.value.errors()] == [("tokens", 1)]


def test_tokenize_takes_a_prompt_or_a_conversation() -> None:
    def parse(**fields: Any) -> TokenizeRequest:
        return parse_tokenize(json.dumps(fields).encode(), limits=LIMITS).request

    hello = [{"role": "user", "content": "Hello"}]
    assert parse(prompt="a", add_special_tokens=False) == TokenizeRequest("a", False)
    asked = parse(model="m", messages=hello, add_generation_prompt=False)
    assert asked.source == ChatRequest("tokenize", "m", (Message("user", (TextPart("Hello"),)),))
    assert not asked.add_generation_prompt
    assert parse_detokenize(b'{"tokens": [1, 2]}', limits=LIMITS).options.tokens == [1, 2]
    for fields, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": hello}, "messages"),
        ({"messages": hello, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": [{"role": "usr"}]}, "messages[0].role"),
        ({"prompt": 3}, "prompt"),
    ):
        with pytest.raises(RequestError) as caught:
            parse(**fields)
        assert caught.value.param == param
    for body in (b"{}", b'{"tokens": [-1]}', b'{"tokens": "a"}'):
        with pytest.raises(RequestError):
            parse_detokenize(body, limits=LIMITS)


class Continuing(EchoEngine):
    """Goes on with a space, as language models do, and keeps what it was asked."""

    asked: Prompt | None = None

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk]:
        self.asked = prompt
        yield Chunk(" and more", "stop", 2, 5, 0)


@pytest.mark.parametrize(
    ("last", "text", "answer"),
    [
        (Message("user", (TextPart("Why?"),)), "USER: Why? ASSISTANT:", "and more"),
        (Message("assistant", (TextPart("Dear"),)), "USER: Hello ASSISTANT: Dear", " and more"),
    ],
)
def test_the_answer_to_a_question_begins_with_a_word_and_a_continued_one_as_it_goes_on(
    last: Message, text: str, answer: str
) -> None:
    hello = Message("user", (TextPart("Hello"),))
    messages = (hello, last) if last.role == "assistant" else (last,)

    async def main() -> None:
        engine = Continuing()
        request = ChatRequest("r", "m", messages)
        chunks = [chunk async for chunk in chat(engine, request, limits=LIMITS)]
        assert [chunk.text for chunk in chunks] == [answer]
        assert engine.asked is not None
        assert engine.asked.text == text

    asyncio.run(main())


# ---- what the engines make of it ----


def test_prompts_go_to_the_model_as_they_are_each_answered_as_if_alone() -> None:
    async def main() -> None:
        engine = load()
        texts = ["USER: hello ASSISTANT:", "once upon", " a"]
        alone = [await answer(engine, prompt(text, max_tokens=12)) for text in texts]
        assert await say(engine, *texts) == dict(enumerate(alone))
        ids = [tuple((await engine.tokenize(prompt(text))).ids) for text in texts]
        assert await say(engine, *ids) == dict(enumerate(alone))
        await engine.close()

    asyncio.run(main())


def test_each_prompt_has_its_answers_side_by_side_and_echo_puts_it_before_them() -> None:
    async def main() -> None:
        engine = EchoEngine()
        a, b = "a (0 images)", "b c (0 images)"
        assert await say(engine, "a", "b c", answers_each=2) == {0: a, 1: a, 2: b, 3: b}
        assert await say(engine, "a", (98, 32, 99), echo=True) == {0: "a" + a, 1: "b c" + b}

    asyncio.run(main())


def test_an_image_that_is_not_there_and_a_token_that_is_not_there_are_refused() -> None:
    async def main() -> None:
        engine = load()
        image = engine._core.image_token_id
        for each, words in (
            ("what is <image>?", "names 1 images and 0 came"),
            ((5, image), "stands for an image"),
            ((5, 10**6), "the vocabulary ends at"),
        ):
            for one in (engine, EchoEngine()) if isinstance(each, str) else (engine,):
                with pytest.raises(RequestError, match=words) as caught:
                    await say(one, each)
                assert caught.value.param == "prompt"
        with pytest.raises(ContextLengthError) as too_long:
            await say(engine, "A" * 600)
        assert too_long.value.param == "prompt"
        await engine.close()

    asyncio.run(main())


def test_tokens_are_those_that_the_model_reads_and_lead_back_to_the_text() -> None:
    async def main() -> None:
        engine = load()
        text = "naïve 狗 red"
        tokens = await engine.tokenize(Prompt("id", text))
        assert tokens.ids == engine._core.encode(text)["input_ids"][0].tolist()
        assert await engine.detokenize(tokens.ids) == "<s>" + text
        bare = await engine.tokenize(Prompt("id", text, add_special_tokens=False))
        assert bare.ids == tokens.ids[1:]
        assert bare.context_length == 512
        assert len(bare.texts) == len(bare.ids)
        with pytest.raises(RequestError, match="the vocabulary ends at") as caught:
            await engine.detokenize([10**6])
        assert caught.value.param == "tokens"
        await engine.close()

    asyncio.run(main())


def test_a_conversation_has_as_many_tokens_as_its_answer_says(tmp_path) -> None:
    async def main() -> None:
        engine = load()
        make_image().save(tmp_path / "a.png")
        image = ImagePart((tmp_path / "a.png").read_bytes())
        chat = ChatRequest("id", "m", (Message("user", (image, TextPart("What?"))),))
        limits = LimitsConfig()
        tokens = await tokenize(engine, TokenizeRequest(chat), limits=limits)
        assert tokens.ids.count(engine._core.image_token_id) == 16
        shut = TokenizeRequest(chat, add_generation_prompt=False)
        assert len((await tokenize(engine, shut, limits=limits)).ids) < len(tokens.ids)
        with pytest.raises(RequestError) as caught:
            await tokenize(engine, TokenizeRequest("an <image>"), limits=limits)
        assert caught.value.param == "prompt"
        await engine.close()

    asyncio.run(main())


def test_echo_has_a_token_for_each_character() -> None:
    async def main() -> None:
        engine = EchoEngine()
        tokens = await engine.tokenize(Prompt("id", "a狗"))
        assert tokens.ids == [97, ord("狗")]
        assert await engine.detokenize(tokens.ids) == "a狗"
        for bad in (0xD800, 0x110000):
            with pytest.raises(RequestError, match="no token"):
                await engine.detokenize([bad])

    asyncio.run(main())
