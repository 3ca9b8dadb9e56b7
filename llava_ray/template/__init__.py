"""Conversation templates: messages -> prompt text, and messages -> ids and labels.

Inference uses what `render` writes and training uses what `encode` returns. Two implementations:

    ListedTemplate   the templates of LLaVA's own code, by name (`TEMPLATES`). `render` and `encode`
                     share one walk over the messages (`ListedTemplate.walk`). `source` writes the
                     same format a second time, as Jinja, for checkpoints that are exported; a test
                     holds the two equal.
    OwnTemplate      the Jinja template that comes with a checkpoint. `encode` finds the answers by
                     rendering each beginning of the conversation.
"""

from typing import TYPE_CHECKING, Any, Protocol

from llava_ray.template.listed import ListedTemplate
from llava_ray.template.own import OwnTemplate
from llava_ray.template.table import OTHER_NAMES, TEMPLATES, find_template
from llava_ray.template.tokens import (
    IGNORED,
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN,
    EncodedConversation,
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
    "EncodedConversation",
    "ListedTemplate",
    "Notation",
    "OwnTemplate",
    "Template",
    "check_images",
    "find_template",
    "tokenize_pieces",
]


class Template(Protocol):
    """Writes conversations in one model's format. See `ListedTemplate` and `OwnTemplate`.

    Attributes:
        name: a key of `TEMPLATES`, or "own".
        stop: texts that end an answer, in addition to the end-of-sequence tokens.
        source: the same template as Jinja, for other engines.
    """

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def source(self) -> str: ...

    def render(self, messages: "Sequence[Message]", *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text, with one image token for each image, in order.

        Args:
            messages: the conversation.
            add_generation_prompt: end with the beginning of the next answer. If the last message is
                the assistant's, end within it, to be continued.

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
    ) -> EncodedConversation:
        """Return a conversation for training: T ids and T labels.

        Args:
            messages: the conversation; the bytes of its images are not read.
            tokenizer: transformers' tokenizer of the model.
            sample_id: names the sample in errors.
            num_images: how many images the sample has; checked against the messages.

        Raises:
            SampleError: it cannot be encoded; the message names the sample.
        """
        ...
