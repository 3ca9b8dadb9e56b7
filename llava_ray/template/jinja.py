"""A listed template as Jinja, for those who read only that: transformers, vLLM, SGLang.

Written beside the weights by `export` and `build`. What it renders is what `ListedTemplate.render`
gives; only the breaking up of special tokens in people's own text is left to whoever renders it.

vLLM looks for a loop over `message['content']` to see that a template takes pictures.
"""

import json
from typing import TYPE_CHECKING

from llava_ray.template.parts import CLOSING, OPENING

if TYPE_CHECKING:
    from llava_ray.template.listed import ListedTemplate

_JOIN = (
    "{% macro join(message) %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '' }}"
    "{% endfor %}{% endif %}{% endmacro %}"
)
_COUNT = (
    "{% macro count(message) %}{% if message['content'] is string %}0{% else %}"
    "{{ message['content'] | selectattr('type', 'equalto', 'image') | list | length }}"
    "{% endif %}{% endmacro %}"
)
_WRITE = (
    "{% macro write(message) %}{% set number = count(message) | int %}"
    "{% if number == 0 %}{{ join(message) }}"
    "{% elif number == 1 %}{{ (picture + '\\n' + join(message) | trim) | trim }}"
    "{% else %}{% set all = namespace(text='') %}"
    "{% for part in message['content'] %}"
    "{% set piece = part['text'] if part['type'] == 'text' else picture %}"
    "{% if (part['type'] == 'image' or all.text.endswith(picture))"
    f" and (all.text[-1:] | trim) not in {OPENING!r} and (piece[:1] | trim) not in {CLOSING!r} %}}"
    "{% set all.text = all.text + '\\n' %}{% endif %}"
    "{% set all.text = all.text + piece %}{% endfor %}{{ all.text | trim }}"
    "{% endif %}{% endmacro %}"
)
"""One picture stands at the front; several stay where they are (see `ListedTemplate`)."""

_APART = (
    "{% if loop.first and count(message) | int and join(message) | trim %}"
    "{% for part in range(count(message) | int) %}{{ picture + ('' if loop.last else '\\n') }}"
    "{% endfor %}"
)
"""Tagged pictures become an exchange of their own, before the question."""


def write_jinja(template: "ListedTemplate") -> str:
    """Return the Jinja source of a listed template."""
    picture = template.tags[0] + template.notation.picture + template.tags[1]
    source = f"{{% set picture = {_quote(picture)} %}}{_JOIN}{_COUNT}{_WRITE}"
    match template.style:
        case "single" | "two":
            return source + _write_named(template)
        case "chatml":
            return source + _write_chatml(template)
        case "llama_2":
            return source + _write_llama_2(template)
        case "plain":
            return f"{source}{_MESSAGES}{{{{ write(message) }}}}{_say(template.end)}{_END}"


_MESSAGES = "{% for message in messages if message['role'] != 'system' %}"
_END = "{% endfor %}"


def _write_named(template: "ListedTemplate") -> str:
    user, assistant = (f"{role}:" for role in template.roles)
    answered = _say(f"{assistant} ") + "{{ write(message) }}" + _say(template.end)
    asked = _say(f"{user} ") + "{{ write(message) }}" + _say(template.gap)
    example = "".join(
        f"{assistant if turn.is_answer else user} {turn.text}"
        f"{template.end if turn.is_answer else template.gap}"
        for turn in template.example
    )
    if any(template.tags):
        received = f"{template.gap}{assistant} Received.{template.end}{user} "
        plain = "{{ join(message) | trim }}" + _say(template.gap)
        apart = _say(f"{user} ") + _APART + _say(received) + plain
        asked = f"{apart}{{% else %}}{{{{ write(message) }}}}{_say(template.gap)}{{% endif %}}"
    return (
        f"{_system(template.system)}{{{{ system }}}}{_say(template.gap)}{_say(example)}{_MESSAGES}"
        f"{{% if message['role'] == 'assistant' %}}{answered}{{% else %}}{asked}{{% endif %}}{_END}"
        f"{{% if add_generation_prompt %}}{_say(assistant)}{{% endif %}}"
    )


def _write_chatml(template: "ListedTemplate") -> str:
    after = _say(template.end + template.gap)
    return (
        f"{_system(template.system)}{_say('<|im_start|>system' + chr(10))}{{{{ system }}}}{after}"
        f"{_MESSAGES}{{{{ '<|im_start|>' + message['role'] + '\\n' }}}}{{{{ write(message) }}}}"
        f"{after}{_END}"
        f"{{% if add_generation_prompt %}}{_say('<|im_start|>assistant' + chr(10))}{{% endif %}}"
    )


def _write_llama_2(template: "ListedTemplate") -> str:
    begin = f"{{% if not loop.first %}}{_say(template.begin)}{{% endif %}}"
    system = (
        "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    )
    return (
        f"{_system(template.system)}{_MESSAGES}{{% if message['role'] == 'assistant' %}}"
        f"{{{{ ' ' + write(message) + ' ' }}}}{_say(template.end)}{{% else %}}"
        f"{begin}{_say('[INST] ')}{system}{{{{ write(message) }}}}{_say(' [/INST]')}"
        f"{{% endif %}}{_END}"
    )


def _system(text: str) -> str:
    return (
        "{% if messages[0]['role'] == 'system' %}{% set system = join(messages[0]) %}"
        f"{{% else %}}{{% set system = {_quote(text)} %}}{{% endif %}}"
    )


def _say(text: str) -> str:
    return f"{{{{ {_quote(text)} }}}}" if text else ""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
