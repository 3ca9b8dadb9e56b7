"""Logprobs of an answer's tokens: the model's own, and in step with the text that is shown."""

import asyncio
import math

import pytest
import torch

from llava_ray.engine.detokenizer import Detokenizer, LogprobCollector
from llava_ray.engine.echo import EchoEngine
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.model.loading import load_model
from llava_ray.types import Chunk, Sampling, TokenLogprob
from tests.support.engine_requests import load, prompt, read
from tests.support.tiny_checkpoint import make_image, tiny_model

WITH_IMAGE = ("USER: <image> what is it? ASSISTANT:", make_image(3))


@pytest.fixture(scope="module")
def core():
    return load_model(tiny_model(), dtype="float32", device="cpu")


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def tokens_of(chunks: list[Chunk]) -> list[TokenLogprob]:
    return [token for chunk in chunks for token in chunk.logprobs]


def test_logprobs_are_those_that_generate_computes_whatever_is_sampled(core) -> None:
    inputs = core.encode(*WITH_IMAGE[:1], WITH_IMAGE[1:])
    made = core.model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.4,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    expected = torch.cat(made.logits).log_softmax(-1)

    async def main() -> None:
        engine = load()
        asked = prompt(*WITH_IMAGE, max_tokens=12, repetition_penalty=1.4, num_logprobs=5)
        beside = prompt("a", max_tokens=12, temperature=1.0, seed=1, num_logprobs=0)
        chunks, others = await asyncio.gather(read(engine, asked), read(engine, beside))
        tokens = tokens_of(chunks)
        got = torch.tensor([token.logprob for token in tokens])
        assert torch.allclose(got, expected[range(12), ids], atol=1e-4)
        best = torch.tensor([[value for _, value in token.top] for token in tokens])
        assert torch.allclose(best, expected.topk(5).values, atol=1e-4)
        assert all(not token.top for token in tokens_of(others))
        assert len(tokens_of(others)) == 12
        await engine.close()

    asyncio.run(main())


def test_without_being_asked_no_logprobs_are_given() -> None:
    async def main() -> None:
        engine = load()
        assert tokens_of(await read(engine, prompt(max_tokens=5))) == []
        await engine.close()

    asyncio.run(main())


def test_the_bytes_of_the_tokens_are_the_bytes_of_the_answer(core) -> None:
    async def main() -> None:
        engine = load()
        for seed in range(8):
            asked = prompt(temperature=1.0, seed=seed, max_tokens=30, num_logprobs=2)
            chunks = await read(engine, asked)
            data = b"".join(token.data for token in tokens_of(chunks))
            special = [
                core.tokenizer.decode([id_]).encode() for id_ in core.tokenizer.all_special_ids
            ]
            for token in special:
                data = data.replace(token, b"")
            assert data.decode(errors="replace") == text_of(chunks)
        await engine.close()

    asyncio.run(main())


def say(words: list[bytes], *, stop: tuple[str, ...] = ()) -> list[tuple[str, list[bytes]]]:
    """What each token of an answer adds: its text, and the tokens that come with it."""

    def decode(ids: list[int]) -> str:
        return b"".join(words[i] for i in ids).decode(errors="replace")

    sequence = Sequence("test", [0], 0, Sampling(), len(words), Detokenizer(decode, stop=stop))
    sequence.logprobs = LogprobCollector(words.__getitem__, num_top=0)
    told = []
    for i in range(len(words)):
        sequence.logprobs.measure(i, -1.0)
        chunk = sequence.append(i)
        told.append((chunk.text, [token.data for token in chunk.logprobs]))
        if chunk.finish_reason:
            break
    return told


def test_logprobs_come_with_the_text_in_which_their_token_begins() -> None:
    assert say([b"ab", b"c"]) == [("ab", [b"ab"]), ("c", [b"c"])]
    dog = "狗".encode()
    assert say([b"a", dog[:1], dog[1:], b""]) == [
        ("a", [b"a"]),
        ("", []),
        ("狗", [dog[:1], dog[1:]]),
        ("", [b""]),
    ]


def test_tokens_of_a_stop_text_have_no_logprobs_unless_they_begin_before_it() -> None:
    stop = ("###",)
    assert say([b"ab", b"c#", b"#", b"#d", b"e"], stop=stop) == [
        ("ab", [b"ab"]),
        ("c", [b"c#"]),
        ("", []),
        ("", []),
    ]
    assert say([b"a", b"#", b"#", b"x"], stop=stop) == [
        ("a", [b"a"]),
        ("", []),
        ("", []),
        ("##x", [b"#", b"#", b"x"]),
    ]


def test_the_end_of_sequence_has_no_logprob() -> None:
    async def main() -> None:
        engine = load()
        end = next(iter(engine._core.eos_token_ids))
        asked = prompt(max_tokens=9, num_logprobs=1, logit_bias=((end, 100.0),), min_tokens=3)
        chunks = await read(engine, asked)
        assert (chunks[-1].finish_reason, chunks[-1].num_tokens) == ("stop", 4)
        assert len(tokens_of(chunks)) == 3
        await engine.close()

    asyncio.run(main())


def test_echo_is_certain_of_each_word() -> None:
    async def main() -> None:
        chunks = await read(EchoEngine(), prompt("one two", num_logprobs=1))
        assert [token.data for token in tokens_of(chunks)][:2] == [b"one", b" two"]
        assert all(math.exp(token.logprob) == 1 for token in tokens_of(chunks))
        assert tokens_of(chunks)[0].top == ((b"one", 0.0),)

    asyncio.run(main())
