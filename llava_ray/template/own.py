"""The chat template that comes with a checkpoint: Jinja, run as transformers' processors run it.

A message is `{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}` to the template,
which must write one image token for each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_ray.errors import RequestError, SampleError
from llava_ray.template.check import check_sample, name_sample
from llava_ray.template.tokens import (
    EncodedConversation,
    Notation,
    Segment,
    count_images,
    encode_segments,
    split_parts,
)
from llava_ray.types import Message

VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% else %}{{ message['role'] | upper + ': ' if message['role'] == 'assistant' else 'USER: ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's roles without a system prompt, for engines that have no template of their own."""


_BROKEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What Jinja lets through when a template does to its values what they do not support."""


@dataclass(frozen=True)
class OwnTemplate:
    """Renders conversations with a Jinja template.

    Attributes:
        source: the template.
        variables: further variables that it may use (`bos_token`, `eos_token`).
        notation: how the checkpoint writes images and reads text.
    """

    source: str = VICUNA
    variables: tuple[tuple[str, str], ...] = ()
    notation: Notation = field(default_factory=Notation)

    @property
    def name(self) -> str:
        """ "own": the template is the checkpoint's."""
        return "own"

    @property
    def stop(self) -> tuple[str, ...]:
        """Empty: in these checkpoints end-of-sequence tokens end an answer."""
        return ()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text; see `Template.render`. Errors quote the template's message."""
        is_continued = add_generation_prompt and messages[-1].role == "assistant"
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [
            {"role": message.role, "content": [self._describe(run) for run in split_parts(message)]}
            for message in messages
        ]
        variables: dict[str, Any] = dict(self.variables)
        try:
            rendered, _ = render_jinja_template(
                conversations=[conversation],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt and not is_continued,
                continue_final_message=is_continued,
                **variables,
            )
        except (TemplateError, *_BROKEN) as error:
            raise RequestError(
                f"this model's chat template does not accept the conversation: {error}; "
                "send user and assistant messages in turn, at most one system message first",
                param="messages",
            ) from error
        num_images, num_written = count_images(messages), rendered[0].count(self.notation.image)
        if num_images != num_written:
            raise RequestError(
                f"this model's chat template writes {num_written} of {num_images} images; send "
                "images in messages of the user, or serve the model with another template",
                param="messages",
            )
        return rendered[0]

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Any,
        *,
        sample_id: str = "",
        num_images: int | None = None,
    ) -> EncodedConversation:
        """Return ids and labels; see `Template.encode`.

        The answer in message k is the difference between the rendered first k messages and the
        prompt that precedes it.

        Raises:
            SampleError: also if a rendered beginning of the conversation is not a prefix of the
                rendered whole.
        """
        check_sample(messages, sample_id, num_images)
        segments: list[Segment] = []
        whole = self._render_part(messages, sample_id, ask=False)
        place = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._render_part(messages[:i], sample_id, ask=True)
            answered = self._render_part(messages[: i + 1], sample_id, ask=False)
            if not (whole.startswith(answered) and answered.startswith(prompt)):
                raise SampleError(
                    f"{name_sample(sample_id)}: the checkpoint's chat template renders message "
                    f"{i + 1} differently when it is not the last, so the tokens to learn cannot "
                    "be identified: give a template by name (template='vicuna_v1')"
                )
            end = len(prompt) + len(self._cut(answered[len(prompt) :]))
            segments += [
                Segment(whole[place : len(prompt)]),
                Segment(whole[len(prompt) : end], True),
            ]
            place = end
        segments.append(Segment(whole[place:]))
        return encode_segments(tokenizer, segments, self.notation)

    def _render_part(self, messages: Sequence[Message], sample_id: str, *, ask: bool) -> str:
        try:
            return self.render(messages, add_generation_prompt=ask)
        except RequestError as error:
            raise SampleError(f"{name_sample(sample_id)}: {error.message}") from error

    def _cut(self, answer: str) -> str:
        """Remove white space after an end-of-turn token, at which generation stops."""
        text = answer.rstrip()
        return text if text.endswith(self.notation.special_tokens) else answer

    def _describe(self, run: str | None) -> dict[str, str]:
        if run is None:
            return {"type": "image"}
        return {"type": "text", "text": self.notation.quote(run)}
