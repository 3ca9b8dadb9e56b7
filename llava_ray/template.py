"""Messages -> the prompt text of one model.

The template is the checkpoint's own Jinja chat template. It sees each message as
`{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}`, as transformers' processors
do, and leaves one `<image>` for each picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.errors import RequestError
from llava_ray.types import Message, TextPart

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
"""LLaVA-1.5's prompt (Vicuna v1.1 roles), for engines that come without a template."""


@dataclass(frozen=True)
class Template:
    """Renders conversations for one model.

    Attributes:
        source: the Jinja chat template.
        image_token: what stands for a picture in the rendered text.
        special_tokens: texts with a meaning to the tokenizer. Inside a user's own text they are
            broken up, so that nobody can end a turn or claim a picture by typing them.
        variables: further names that the template may use (`bos_token`, `eos_token`).
    """

    source: str = VICUNA
    image_token: str = "<image>"
    special_tokens: tuple[str, ...] = ("<image>", "<s>", "</s>")
    variables: tuple[tuple[str, str], ...] = ()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text, with `image_token` once for each picture, in order.

        Raises:
            RequestError: the template does not accept this conversation (for example its order
                of roles); the message says what the template said.
        """
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [
            {"role": message.role, "content": [self._describe(part) for part in message.parts]}
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

    def _describe(self, part: Any) -> dict[str, str]:
        if not isinstance(part, TextPart):
            return {"type": "image"}
        text = part.text
        for token in self.special_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return {"type": "text", "text": text}
