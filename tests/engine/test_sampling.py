"""How the next token is chosen: as transformers' logits processors do it, each row by itself."""

import asyncio
from random import Random

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from llava_ray.engine.detokenizer import Detokenizer
from llava_ray.engine.torch_engine.execution.logits_processors import adjust
from llava_ray.engine.torch_engine.execution.sampler import sample
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.errors import RequestError
from llava_ray.model.loading import load_model
from llava_ray.types import Sampling
from tests.support.engine_requests import answer, load, prompt, read
from tests.support.tiny_checkpoint import make_image, tiny_model

VOCABULARY = 50
PROMPT = [3, 9, 9, 49, 50]  # 50, the id of an image, is beyond the vocabulary
ANSWER = [7, 3, 7, 7]
EOS = 2


def sequence(*, answer: list[int] = ANSWER, **sampling) -> Sequence:
    text = Detokenizer(lambda ids: "".join(f"{i} " for i in ids))
    options = Sampling(**{"temperature": 0.0} | sampling)
    made = Sequence("test", PROMPT, 0, options, 99, text, eos_token_ids=frozenset([EOS]))
    for token in answer:
        made.append(token)
    return made


def random_logits(rows: int = 1, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def adjusted(logits: torch.Tensor, **sampling) -> torch.Tensor:
    own = logits.clone()
    adjust(own, [sequence(**sampling)])
    return own


def draw_evenly(logits_1V: torch.Tensor, count: int = 2000, **sampling) -> torch.Tensor:
    """The share of each token when a row's random number goes through 0 to 1 in even steps."""

    class Even(Random):
        def random(self) -> float:
            return self.at

    rows = [sequence(**sampling) for _ in range(count)]
    for i, row in enumerate(rows):
        row.random = Even()
        row.random.at = (i + 0.5) / count
    tokens = sample(logits_1V.expand(count, -1), rows).tokens_B
    return tokens.bincount(minlength=VOCABULARY) / count


# ---- against transformers ----


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    seen = torch.tensor([[id_ for id_ in PROMPT + ANSWER if id_ < VOCABULARY]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, random_logits())
    assert torch.equal(adjusted(random_logits(), repetition_penalty=penalty), expected)


def test_biases_are_added_as_in_transformers() -> None:
    bias = {7: -100.0, 11: 2.5}
    expected = SequenceBiasLogitsProcessor([[[id_], value] for id_, value in bias.items()])(
        torch.tensor([[1]]), random_logits()
    )
    assert torch.equal(adjusted(random_logits(), logit_bias=tuple(bias.items())), expected)


@pytest.mark.parametrize("min_tokens", [3, 4, 5, 9])
def test_an_answer_that_is_too_short_cannot_end_as_in_transformers(min_tokens: int) -> None:
    ids = torch.tensor([PROMPT[:-1] + ANSWER])
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT) - 1, min_tokens, [EOS, 5])
    expected = processor(ids, random_logits())
    got = adjusted(random_logits(), min_tokens=min_tokens, stop_token_ids=(5,))
    assert torch.equal(got, expected)


def test_presence_and_frequency_look_at_the_answer_alone() -> None:
    logits = random_logits()
    got = adjusted(logits, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    expected[0, 7] -= 0.5 + 3 * 0.25
    expected[0, 3] -= 0.5 + 0.25
    assert torch.allclose(got, expected)


@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 999}, TopKLogitsWarper(VOCABULARY)),
        ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
        ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
    ],
)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_what_is_drawn_from_is_what_transformers_leaves(
    sampling: dict, warper, temperature: float
) -> None:
    logits = random_logits(seed=3)
    expected = warper(None, TemperatureLogitsWarper(temperature)(None, logits.clone())).softmax(-1)
    got = draw_evenly(logits, temperature=temperature, **sampling)
    assert (got - expected[0]).abs().max() < 0.002


def test_top_p_counts_what_top_k_and_min_p_have_left() -> None:
    logits = torch.full((1, VOCABULARY), -50.0)
    logits[0, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    shares = draw_evenly(logits, temperature=1, top_k=2, top_p=0.5)  # 4/7 alone is enough
    assert shares[0] == 1
    shares = draw_evenly(logits, temperature=1, min_p=0.4, top_p=0.9)  # 4/9, 3/9 and 2/9
    assert shares[:4].tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=0.002)


# ---- rows by themselves ----

MIXED = [
    {},
    {"repetition_penalty": 1.7},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.9, "top_k": 3, "seed": 1},
    {"temperature": 1.3, "min_p": 0.1, "frequency_penalty": 1.0, "seed": 2},
    {"presence_penalty": 2.0, "logit_bias": ((4, 30.0),)},
    {"min_tokens": 9},
    {"temperature": 1e-30, "seed": 3},
]


def test_a_row_comes_out_the_same_alone_and_beside_any_others() -> None:
    logits = random_logits(len(MIXED), seed=8)
    rows = [[sequence(**asked)] for asked in MIXED]
    alone = [sample(logits[i : i + 1], row).read()[0] for i, row in enumerate(rows)]
    assert sample(logits, [sequence(**asked) for asked in MIXED]).read() == alone
    assert (alone[0], alone[-1]) == (logits[0].argmax(), logits[-1].argmax())


def test_the_logits_of_plain_rows_are_not_touched() -> None:
    logits = random_logits(len(MIXED), seed=8)
    before = logits.clone()
    sample(logits, [sequence(**asked) for asked in MIXED])
    assert torch.equal(logits, before)


# ---- in the engine ----


def generate(each, **options) -> list[int]:
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    inputs = core.encode(each.text, each.images)
    ids = core.model.generate(
        **inputs, max_new_tokens=each.sampling.max_tokens, do_sample=False, **options
    )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def decode(ids: list[int]) -> str:
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    return core.tokenizer.decode(ids, skip_special_tokens=True)


def test_greedy_answers_with_penalties_are_those_of_generate() -> None:
    with_image = ("USER: <image> what is it? ASSISTANT:", make_image(3))
    asked = [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"logit_bias": ((70, 9.0),)}, {"sequence_bias": [[[70], 9.0]]}),
    ]

    async def main() -> None:
        engine = load()
        prompts = [prompt(*with_image, max_tokens=30, **ours) for ours, _ in asked]
        answers = await asyncio.gather(*[answer(engine, each) for each in prompts])
        plain = await answer(engine, prompt(*with_image, max_tokens=30))
        for each, got, (_, theirs) in zip(prompts, answers, asked, strict=True):
            assert got == decode(generate(each, **theirs)) != plain
        await engine.close()

    asyncio.run(main())


def test_stop_token_ids_end_an_answer_and_min_tokens_lengthens_it() -> None:
    async def main() -> None:
        engine = load()
        ids = generate(prompt(max_tokens=20))
        at = next(i for i in range(5, 20) if ids[i] not in ids[:i])
        stop = (ids[at],)
        short = await read(engine, prompt(max_tokens=20, stop_token_ids=stop, ignore_eos=True))
        assert (short[-1].finish_reason, short[-1].num_tokens) == ("stop", at + 1)
        assert "".join(chunk.text for chunk in short) == decode(ids[:at])
        longer = await read(engine, prompt(max_tokens=20, stop_token_ids=stop, min_tokens=19))
        assert longer[-1].num_tokens > at + 1
        letter = decode(ids)[2]
        late = await read(engine, prompt(max_tokens=20, stop=(letter,), min_tokens=12))
        assert late[-1].num_tokens > 12
        await engine.close()

    asyncio.run(main())


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    async def main() -> None:
        engine = load()
        with pytest.raises(RequestError, match="the vocabulary ends at") as caught:
            await answer(engine, prompt(logit_bias=((10**6, 1.0),)))
        assert caught.value.param == "logit_bias"
        await engine.close()

    asyncio.run(main())
