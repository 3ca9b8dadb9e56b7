"""A text that cannot fit is refused before all of it is tokenised."""

import dataclasses

import pytest

from llava_ray.engine.input_processor import InputProcessor
from llava_ray.errors import ContextLengthError
from llava_ray.model.loading import load_model
from llava_ray.types import Prompt
from tests.support.engine_requests import prompt
from tests.support.tiny_checkpoint import make_image, tiny_model

ROOM = 512


class CountingTokenizer:
    """The model's tokenizer; it records the longest text that it was given."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.longest = 0

    def __call__(self, text, **options):
        self.longest = max(self.longest, len(text))
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> tuple[InputProcessor, CountingTokenizer]:
    model = load_model(tiny_model(), dtype="float32", device="cpu")
    counting = CountingTokenizer(model.tokenizer)
    monkeypatch.setattr(model.processor, "tokenizer", counting)
    model = dataclasses.replace(model, tokenizer=counting)
    return InputProcessor(model, context_length=ROOM, room=ROOM), counting


@pytest.mark.parametrize("word", ["a ", " ", "狗", "\x00", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"])
def test_twelve_megabytes_of_text_are_refused_for_their_length(inputs, word: str) -> None:
    processor, tokenizer = inputs
    with pytest.raises(ContextLengthError, match=r"characters, more than 512 tokens"):
        processor.read(prompt(word * (12_000_000 // len(word))))
    assert tokenizer.longest < 200_000


def test_a_long_text_beside_an_image_is_refused_as_well(inputs) -> None:
    processor, tokenizer = inputs
    with pytest.raises(ContextLengthError, match="shorten the conversation"):
        processor.read(prompt("<image> " + "a " * 1_000_000, make_image()))
    assert tokenizer.longest < 200_000


def test_tokens_are_counted_for_texts_that_are_some_times_too_long(inputs) -> None:
    processor, _ = inputs
    text = "a " * 2000
    assert len(processor.tokenize(Prompt("id", text)).ids) > ROOM
    with pytest.raises(ContextLengthError):
        processor.tokenize(Prompt("id", text * 1000))
