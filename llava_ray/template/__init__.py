"""Conversations as a model reads them: messages -> prompt text; messages -> ids and labels.

Between the records of a conversation and everything that computes: an engine is asked with what
`render` writes and a model is trained on what `encode` gives, and both come from one walk over the
messages. `TEMPLATES` are those of LLaVA's own code, by name; `OwnTemplate` runs the Jinja template
that a checkpoint of transformers brings.
"""

from typing import TYPE_CHECKING, Any, Protocol

from llava_ray.template.listed import ListedTemplate
from llava_ray.template.own import OwnTemplate
from llava_ray.template.table import OTHER_NAMES, TEMPLATES, find_template
from llava_ray.template.tokens import (
    IGNORED,
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN,
    Encoded,
    Notation,
    check_images,
    tokenize_pieces,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_ray.types import Message

__all__ = [
    "IGNORED",
    "IMAGE_PLACEHOLDER",
    "IMAGE_TOKEN",
    "OTHER_NAMES",
    "TEMPLATES",
    "Encoded",
    "ListedTemplate",
    "Notation",
    "OwnTemplate",
    "Template",
    "check_images",
    "find_template",
    "tokenize_pieces",
]


class Template(Protocol):
    """Writes conversations for one model. Implementations: `ListedTemplate`, `OwnTemplate`.

    Attributes:
        name: as in `TEMPLATES`, or "own".
        stop: texts at which an answer ends, beside the end-of-sequence tokens.
        source: the same template in Jinja, which other engines take.
    """

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def source(self) -> str: ...

    def render(self, messages: "Sequence[Message]", *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text, with the image token once for each image, in order.

        Raises:
            RequestError: the template does not accept this conversation.
        """
        ...

    def encode(
        self,
        messages: "Sequence[Message]",
        tokenizer: Any,
        *,
        sample_id: str = "",
        num_images: int | None = None,
    ) -> Encoded:
        """Return a conversation as training reads it: T ids, and T labels.

        Args:
            messages: the conversation; the bytes of its images are not looked at.
            tokenizer: transformers' tokenizer of the model.
            sample_id: names the sample in errors.
            num_images: how many images come with the sample, to be compared with the messages'.

        Raises:
            SampleError: it cannot be encoded; the message names the sample.
        """
        ...
