"""The template that a checkpoint brings: Jinja, as transformers' processors run it.

It sees each message as `{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}` and
leaves one image token for each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_ray.errors import RequestError, SampleError
from llava_ray.template.check import check_sample, name_sample
from llava_ray.template.tokens import Encoded, Notation, Piece, encode_pieces, split_parts
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
"""LLaVA-1.5's roles and nothing else, for engines that come without a template."""


@dataclass(frozen=True)
class OwnTemplate:
    """Renders conversations with a Jinja template.

    Attributes:
        source: the template.
        variables: further names that it may use (`bos_token`, `eos_token`).
        notation: how the checkpoint writes images and reads text.
    """

    source: str = VICUNA
    variables: tuple[tuple[str, str], ...] = ()
    notation: Notation = field(default_factory=Notation)

    @property
    def name(self) -> str:
        """Says that it is the checkpoint's own."""
        return "own"

    @property
    def stop(self) -> tuple[str, ...]:
        """None: such checkpoints say with tokens that an answer ends."""
        return ()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text; see `Template.render`. The error says what the template said."""
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
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except TemplateError as error:
            raise RequestError(
                f"this model's chat template does not accept the conversation: {error}; "
                "send user and assistant messages in turn, at most one system message first",
                param="messages",
            ) from error
        return rendered[0]

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Any,
        *,
        sample_id: str = "",
        num_images: int | None = None,
    ) -> Encoded:
        """Return ids and labels; see `Template.encode`.

        The answer at message k is what the text of k messages has and the prompt for it has not.

        Raises:
            SampleError: also if the texts of a conversation's beginnings do not begin the whole.
        """
        check_sample(messages, sample_id, num_images)
        pieces: list[Piece] = []
        whole = self._render_part(messages, sample_id, ask=False)
        place = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._render_part(messages[:i], sample_id, ask=True)
            answered = self._render_part(messages[: i + 1], sample_id, ask=False)
            if not (whole.startswith(answered) and answered.startswith(prompt)):
                raise SampleError(
                    f"{name_sample(sample_id)}: the checkpoint's chat template writes message "
                    f"{i + 1} in another way when it is not the last, so it cannot be told what "
                    "of it is learned: give a template by name (template='vicuna_v1')"
                )
            end = len(prompt) + len(self._cut(answered[len(prompt) :]))
            pieces += [Piece(whole[place : len(prompt)]), Piece(whole[len(prompt) : end], True)]
            place = end
        pieces.append(Piece(whole[place:]))
        return encode_pieces(tokenizer, pieces, self.notation)

    def _render_part(self, messages: Sequence[Message], sample_id: str, *, ask: bool) -> str:
        try:
            return self.render(messages, add_generation_prompt=ask)
        except RequestError as error:
            raise SampleError(f"{name_sample(sample_id)}: {error.message}") from error

    def _cut(self, answer: str) -> str:
        """Leave out the space behind an end-of-turn token, which no answer gets as far as."""
        text = answer.rstrip()
        return text if text.endswith(self.notation.special_tokens) else answer

    def _describe(self, run: str | None) -> dict[str, str]:
        if run is None:
            return {"type": "image"}
        return {"type": "text", "text": self.notation.quote(run)}
