"""The `Engine` protocol: the interface between whatever asks (serving, evaluation, the command
line) and whatever computes the answer."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from llava_ray.template import Template
from llava_ray.types import Chunk, Prompt, Tokens


class NoteImages(Protocol):
    """Callback for the new images of each step, from engines that encode images themselves.

    It may be called from any thread.

    Args:
        num_encoded: images that went through the vision tower.
        num_cached: images whose features, or keys and values, were cached already.
        seconds: time spent in the vision tower.
    """

    def __call__(self, num_encoded: int, num_cached: int, seconds: float) -> None: ...


def ignore_images(num_encoded: int, num_cached: int, seconds: float) -> None:
    """Do nothing: the default `NoteImages`."""


class Engine(Protocol):
    """Answers many prompts concurrently. Implementations: TorchEngine, EchoEngine, ExternalEngine.

    An engine knows neither HTTP nor Ray. It raises errors and never yields them.

    Attributes:
        template: renders conversations into the prompts that this engine's model was trained on.
        context_length: longest prompt plus answer, in tokens.
    """

    template: Template
    context_length: int

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk]:
        """Yield the answer in chunks; only the last one has a `finish_reason`.

        Closing the iterator, or cancelling the task that reads it, aborts the request and frees
        its memory.

        Raises:
            ContextLengthError: before the first chunk, if the prompt does not fit.
            RequestError: before the first chunk, if the prompt is invalid or asks for something
                that the engine does not support.
            EngineError: the engine failed.
        """
        ...

    async def tokenize(self, prompt: Prompt) -> Tokens:
        """Return a prompt's tokens, as this engine's model reads it.

        Raises:
            RequestError: the prompt is invalid.
        """
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, including special tokens.

        Raises:
            RequestError: a token id is outside the vocabulary.
        """
        ...

    async def check(self) -> None:
        """Health check: return promptly if the engine works.

        Raises:
            EngineError: it does not, and its replica should be replaced.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Return the current figures: at least `num_running`, `num_waiting`, `cache_tokens_used`
        and `cache_tokens_total`."""
        ...

    def describe(self) -> dict[str, str]:
        """Return how this engine computes, for people: device, dtype, attention, graphs, ..."""
        ...

    async def close(self) -> None:
        """Abort all requests and free the device."""
        ...
