"""The seam between serving or evaluation and whatever computes the answer."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from llava_ray.template import Template
from llava_ray.types import Chunk, Prompt, Tokens


class NoteImages(Protocol):
    """Told of each step's new images, by an engine that encodes them itself, in any thread.

    Args:
        num_encoded: those that went through the vision tower.
        num_cached: those that did not have to, because they had been before.
        seconds: that the vision tower took.
    """

    def __call__(self, num_encoded: int, num_cached: int, seconds: float) -> None: ...


def ignore_images(num_encoded: int, num_cached: int, seconds: float) -> None:
    """For those who do not want to know; see `NoteImages`."""


class Engine(Protocol):
    """Answers prompts, many at once. Implementations: TorchEngine, EchoEngine, ExternalEngine.

    An engine knows neither HTTP nor Ray. Errors are raised, never yielded.

    Attributes:
        template: renders conversations into the prompts that this engine's model was trained on.
        context_length: longest prompt plus answer, in tokens.
    """

    template: Template
    context_length: int

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk]:
        """Yield the answer piece by piece; the last chunk alone has a `finish_reason`.

        Closing the iterator (or cancelling the task that reads it) aborts the request and frees
        what it held.

        Raises:
            ContextLengthError: before the first chunk, if the prompt does not fit.
            RequestError: before the first chunk, if the prompt cannot be served as it is.
            EngineError: the engine broke.
        """
        ...

    async def tokenize(self, prompt: Prompt) -> Tokens:
        """Return the tokens that a prompt has for this engine's model.

        Raises:
            RequestError: the prompt cannot be read.
        """
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included.

        Raises:
            RequestError: there is no such token.
        """
        ...

    async def check(self) -> None:
        """Return soon if the engine is able to work.

        Raises:
            EngineError: it is not, and the replica should be replaced.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Figures of this moment: at least `num_running`, `num_waiting`, `cache_tokens_used` and
        `cache_tokens_total`."""
        ...

    async def close(self) -> None:
        """Abort what is running and free the device."""
        ...
