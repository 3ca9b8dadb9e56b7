"""Answers in a format: whatever the model would say, they parse and fit the schema."""

import asyncio
import json
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from llava_ray.config import LimitsConfig
from llava_ray.engine.chat import render
from llava_ray.engine.echo import EchoEngine
from llava_ray.engine.structured_output import Vocabulary
from llava_ray.errors import RequestError, UnsupportedError
from llava_ray.model.loading import load_model
from llava_ray.types import ChatRequest, Chunk, Message, Sampling, TextPart
from tests.support.engine_requests import load, prompt, read
from tests.support.tiny_checkpoint import make_image, tiny_model

OBJECT = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "très bleu 狗"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "sure": {"type": "boolean"},
        "boxes": {
            "type": "array",
            "maxItems": 2,
            "items": {"type": "string", "pattern": "^[a-z]{1,3}$"},
        },
        "note": {"type": "string", "maxLength": 6},
    },
    "required": ["colour", "count", "sure", "boxes", "note"],
    "additionalProperties": False,
}
NESTED = {
    "$defs": {
        "point": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    },
    "type": "object",
    "properties": {
        "a": {"$ref": "#/$defs/point"},
        "b": {"anyOf": [{"type": "null"}, {"enum": [3]}]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
ENDING = [OBJECT, {"enum": ["yes", "no"]}, {"const": {"a": [1, None]}}]
OPEN = [{"type": "object"}, NESTED, {"type": "array", "items": {"type": "number"}}]


async def ask(engine, schema: Any, **sampling) -> tuple[str, Chunk]:
    sampling = {"max_tokens": 200, "json_schema": json.dumps(schema)} | sampling
    chunks = await read(engine, prompt("a <image>", make_image(), **sampling))
    return "".join(chunk.text for chunk in chunks), chunks[-1]


@pytest.mark.parametrize("schema", ENDING)
def test_an_answer_to_a_schema_that_bounds_it_always_ends_and_fits(schema: Any) -> None:
    async def main() -> None:
        engine = load()
        settings = [{"temperature": 0.0}, {"temperature": 0.0, "ignore_eos": True}]
        settings += [{"temperature": 1.5, "seed": seed} for seed in range(10)]
        settings += [{"temperature": 1.0, "seed": 1, "top_k": 5, "repetition_penalty": 3.0}]
        settings += [{"temperature": 1.0, "seed": 1, "min_tokens": 300, "max_tokens": 300}]
        answers = await asyncio.gather(*[ask(engine, schema, **each) for each in settings])
        for text, last in answers:
            assert last.finish_reason == "stop"
            jsonschema.validate(json.loads(text), schema)
        await engine.close()

    asyncio.run(main())


HOSTILE = {
    "large multiples": {"type": "integer", "multipleOf": 1000003},
    "patterns at once": {
        "allOf": [{"type": "string", "pattern": f".*a.{{{i}}}.*"} for i in range(1, 30)]
    },
    "a large enum": {"enum": [str(i) * 20 for i in range(200_000)]},
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=list(HOSTILE))
def test_a_schema_that_takes_too_long_is_refused_while_others_are_answered(schema: Any) -> None:
    async def main() -> None:
        engine = load()
        hostile = [asyncio.create_task(ask(engine, schema)) for _ in range(3)]
        text, _ = await ask(engine, {"enum": ["yes", "no"]})
        assert json.loads(text) in ("yes", "no")
        assert not any(task.done() for task in hostile)
        for refused in await asyncio.gather(*hostile, return_exceptions=True):
            assert isinstance(refused, RequestError)
            assert refused.param == "response_format"
            assert "cannot be enforced" in refused.message
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("schema", OPEN)
def test_an_answer_to_any_schema_fits_if_it_ends(schema: Any) -> None:
    async def main() -> None:
        engine = load(cache_tokens=8000)
        end = next(iter(engine._core.eos_token_ids))
        settings = [
            {"temperature": 1.0, "seed": seed, "logit_bias": ((end, 5.0),)} for seed in range(12)
        ]
        answers = await asyncio.gather(*[ask(engine, schema, **each) for each in settings])
        ended = [text for text, last in answers if last.finish_reason == "stop"]
        assert ended
        for text in ended:
            jsonschema.validate(json.loads(text), schema)
        await engine.close()

    asyncio.run(main())


def test_others_in_the_batch_answer_as_if_alone() -> None:
    async def main() -> None:
        engine = load()
        plain = prompt("hello", max_tokens=20)
        alone = await read(engine, plain)
        _, beside = await asyncio.gather(ask(engine, OBJECT), read(engine, plain))
        assert beside == alone
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objct"}, "Invalid type: objct"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "https://example.com/schema"}, "does not fetch"),
        ({"not": {"type": "null"}}, "Unimplemented keys"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ({"type": "object", "properties": 3}, "cannot be enforced"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_with_the_reason(
    schema: Any, words: str
) -> None:
    async def main() -> None:
        engine = load()
        with pytest.raises(RequestError, match=words) as caught:
            await ask(engine, schema)
        assert caught.value.param == "response_format"
        assert "cannot be enforced" in caught.value.message
        assert (await ask(engine, {"const": 1}))[0] == "1"
        await engine.close()

    asyncio.run(main())


def test_json_may_hold_what_ends_the_template() -> None:
    engine = EchoEngine(template="llava_v0")
    stop = engine.template.stop
    assert stop
    said = (Message("user", (TextPart("Hello"),)),)
    for sampling, expected in ((Sampling(), stop), (Sampling(json_schema="{}"), ())):
        request = ChatRequest("id", "m", said, sampling)
        assert render(engine, request, LimitsConfig()).sampling.stop == expected


def test_echo_refuses_a_format() -> None:
    with pytest.raises(UnsupportedError, match="echo engine"):
        asyncio.run(read(EchoEngine(), prompt(json_schema="{}")))


def build_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's: pieces of text with ▁ for a space, and bytes for the rest."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    pieces += ["▁", "a", "b", '"', "{", "}", ":", ",", "é", "▁a", '{"', '":']
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("{", '"'), ('"', ":")], byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_tokens_of_both_kinds_of_tokenizers_are_spelled_as_bytes() -> None:
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    text = 'é 狗 {"a": 1}'
    for tokenizer in (core.tokenizer, build_fallback_tokenizer()):
        end = tokenizer.eos_token_id
        vocabulary = Vocabulary(tokenizer, size=1024, eos_token_ids=frozenset([end]))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(vocabulary.spell(id_) for id_ in ids).decode() == text
        assert vocabulary.spell(1023) == b""
        grammar = vocabulary.compile('{"enum": ["a é狗"]}')
        for id_ in tokenizer.encode('"a é狗"', add_special_tokens=False):
            assert not grammar.is_over
            allowed = grammar.list_allowed()
            assert allowed[id_]
            assert not allowed[end]
            grammar.accept(id_)
        assert grammar.is_over
        assert not grammar.is_broken


def test_a_tokenizer_that_does_not_tell_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="without logprobs and response_format"):
        Vocabulary(range(3), size=3, eos_token_ids=frozenset([1]))
