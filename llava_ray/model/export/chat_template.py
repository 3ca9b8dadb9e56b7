"""Makes the chat template that is written with a new LLaVA, or with one that had none.

For `build` and `export`. Servers use the rendered text unchanged, so the template also writes the
beginning-of-sequence token. A language model's own template supports only text; code before it
turns each message into text, with `<image>` for each image.
"""

from dataclasses import replace
from typing import Any

from llava_ray.model.choose_template import guess_template
from llava_ray.template import find_template

_FOR_NEW = "vicuna_v1"
"""The template of a new LLaVA whose language model has never learned one: any will do."""

_TAKE_IMAGES = (
    "{%- set texts = namespace(all=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set texts.all = texts.all + [message] -%}"
    "{%- else -%}{%- set text = namespace(all='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set text.all = text.all + '<image>' + ('' if loop.last else '\\n') -%}"
    "{%- else -%}{%- set text.all = text.all + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set texts.all = texts.all + [{'role': message['role'], 'content': text.all}] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- set messages = texts.all -%}"
)


def choose_chat(tokenizer: Any, text_model_type: str, name: str | None) -> tuple[str, str | None]:
    """Return the Jinja source for a new LLaVA, and the name of the equivalent listed template.

    In this order: the template of that name; the language model's own; the listed one that suits
    the language model, with the tokenizer's end-of-sequence token. The name is None if no listed
    template is equivalent.

    Args:
        tokenizer: the language model's.
        text_model_type: the language model's.
        name: of a listed template.

    Raises:
        ConfigError: there is no template of that name.
    """
    if name is None and isinstance(tokenizer.chat_template, str):
        return add_beginning(_TAKE_IMAGES + tokenizer.chat_template, tokenizer), None
    suited = guess_template({"text_model_type": text_model_type}, tokenizer)
    named = find_template(name or suited or _FOR_NEW)
    known = named.end != "</s>" or tokenizer.eos_token == "</s>"
    if name is not None or known or not tokenizer.eos_token:
        return add_beginning(named.source, tokenizer), named.name
    template = replace(named, end=tokenizer.eos_token)
    return add_beginning(template.source, tokenizer), None


def add_beginning(source: str, tokenizer: Any) -> str:
    """Return a template that writes the beginning-of-sequence token, if the tokenizer adds one."""
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    bos = tokenizer.bos_token
    if not bos or tokenizer("").input_ids[:1] != [tokenizer.bos_token_id]:
        return source
    try:
        said = {"role": "user", "content": [{"type": "text", "text": "a"}]}
        (written,), _ = render_jinja_template(
            conversations=[[said]],
            chat_template=source,
            add_generation_prompt=True,
            bos_token=bos,
            eos_token=tokenizer.eos_token or "",
        )
    except TemplateError:
        return source
    return source if written.startswith(bos) else "{{ bos_token }}" + source
