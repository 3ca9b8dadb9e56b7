"""The templates of LLaVA's own code: one class, of which `table` has an instance for each template.

messages -> turns (images written out) -> the walk of the style -> text, or ids and labels

LLaVA's trainer writes some conversations differently from its server: the style "single", the
exchange around tagged images, and "plain", whose questions it leaves out. Checkpoints are trained
with one form and served with the other, so both are kept: `encode` uses the trainer's, `render` the
server's.

The second half of the file writes a template as Jinja, for checkpoints that are exported.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_ray.errors import RequestError, SampleError
from llava_ray.template.check import check_sample, find_problem, name_sample
from llava_ray.template.styles import (
    RenderedTurn,
    Style,
    walk_caption,
    walk_chatml,
    walk_headed,
    walk_llama_2,
    walk_named,
    walk_plain,
)
from llava_ray.template.tokens import (
    CLOSING,
    IGNORED,
    IMAGE_PLACEHOLDER,
    OPENING,
    EncodedConversation,
    Notation,
    Segment,
    count_images,
    encode_segments,
    join_text,
    split_parts,
    tokenize_pieces,
    touch,
)
from llava_ray.types import Message


@dataclass(frozen=True)
class ListedTemplate:
    """One template of LLaVA's own code.

    Attributes:
        name: its key in `TEMPLATES`.
        style: how a conversation is written; see `styles`.
        system: the system text, unless the conversation has a system message.
        roles: the names of user and assistant, for styles that write them.
        end: written at the end of an answer, and learned with it.
        begin: written before every question but the first ("llama_2").
        gap: written after a question ("single", "two"), or after every turn ("chatml").
        example: an exchange at the beginning of each prompt.
        tags: written before and after each image.
        is_interleaved: images stay where they are in the text of a prompt, as in the training of
            these models; otherwise they come first, as in llava-hf's templates.
        notation: how the checkpoint writes images and tokenises text.
    """

    name: str
    style: Style
    system: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    end: str = "</s>"
    begin: str = ""
    gap: str = ""
    example: tuple[RenderedTurn, ...] = ()
    tags: tuple[str, str] = ("", "")
    is_interleaved: bool = False
    notation: Notation = field(default_factory=Notation)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return () if self.style == "plain" else (self.end,)

    @property
    def has_system(self) -> bool:
        """Whether the template supports a system message."""
        return self.style != "plain"

    @property
    def source(self) -> str:
        """The same template as Jinja, for checkpoints that are exported."""
        return _write_jinja(self)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text; see `Template.render`."""
        if problem := find_problem(messages, has_system=self.has_system):
            raise RequestError(problem, param="messages")
        is_continued = add_generation_prompt and messages[-1].role == "assistant"
        segments = self.walk(messages, ask=add_generation_prompt and not is_continued)
        text = "".join(segment.text for segment in segments)
        return self._open_answer(text) if is_continued else text

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Any,
        *,
        sample_id: str = "",
        num_images: int | None = None,
    ) -> EncodedConversation:
        """Return ids and labels; see `Template.encode`.

        An answer at the very beginning, before any question, is left out, as in LLaVA's trainer.
        Where that trainer reports a "tokenization mismatch" and masks the whole sample, the answers
        are learned here, each with the text that ends it.
        """
        if self.style == "plain":
            _check_caption(messages, sample_id)
        else:
            messages = _skip_answer(messages)
        check_sample(messages, sample_id, num_images, has_system=self.has_system)
        segments = list(self.walk(messages, for_training=True))
        if self.style == "single":
            return _encode_headed(tokenizer, segments, self.notation)
        return encode_segments(tokenizer, segments, self.notation)

    def walk(
        self, messages: Sequence[Message], *, for_training: bool = False, ask: bool = False
    ) -> Iterator[Segment]:
        """Return the segments of a conversation's text; `render` and `encode` both use this.

        Args:
            messages: the conversation, checked by `find_problem` or `check_sample`.
            for_training: use the form of LLaVA's trainer where it differs from its server's.
            ask: end with the prompt for an answer.
        """
        system = self.system
        if messages[0].role == "system":
            system = self.notation.quote(join_text(messages[0]))
            messages = messages[1:]
        keeps_order = for_training or self.is_interleaved
        turns = [RenderedTurn(m.role == "assistant", self._write(m, keeps_order)) for m in messages]
        if not for_training:
            turns = [*self.example, *self._set_apart(messages[0], turns[0]), *turns[1:]]
        match self.style:
            case "single" if for_training:
                return walk_headed(system, turns, roles=self.roles)
            case "single" | "two":
                return walk_named(
                    system, turns, roles=self.roles, gap=self.gap, end=self.end, ask=ask
                )
            case "chatml":
                return walk_chatml(system, turns, gap=self.gap, end=self.end, ask=ask)
            case "llama_2":
                return walk_llama_2(system, turns, begin=self.begin, end=self.end)
            case "plain" if for_training:
                images = self.notation.image_token * count_images(messages[:1])
                return walk_caption(images, turns[1].text, end=self.end)
            case "plain":
                return walk_plain(turns, end=self.end)

    def _open_answer(self, text: str) -> str:
        """Return a conversation that ends with an answer, without what ends the answer."""
        before = text.removesuffix(self.gap if self.style == "chatml" else "")
        before = before.removesuffix(self.end)
        return before.removesuffix(" ") if self.style == "llama_2" else before

    def _write(self, message: Message, keeps_order: bool) -> str:
        """Return a message as text.

        Images are moved to the front, each on a line of its own. Several images stay where they
        are if `keeps_order`, with a line break between an image and a word or image that would
        touch it.
        """
        num_images = count_images([message])
        text = self.notation.quote(join_text(message))
        if num_images == 0:
            return text
        if num_images == 1 or not keeps_order:
            return "\n".join([*[self._image] * num_images, text.strip()]).strip()
        written = ""
        for run in split_parts(message):
            text = self._image if run is None else self.notation.quote(run)
            if (run is None or written.endswith(self._image)) and touch(written, text):
                written += "\n"
            written += text
        return written.strip()

    @property
    def _image(self) -> str:
        return self.tags[0] + self.notation.image + self.tags[1]

    def _set_apart(self, message: Message, turn: RenderedTurn) -> list[RenderedTurn]:
        """Return the first turn of a prompt; tagged images get an exchange before it."""
        text = self.notation.quote(join_text(message)).strip()
        num_images = count_images([message])
        if not (any(self.tags) and num_images and text):
            return [turn]
        images = "\n".join([self._image] * num_images)
        return [
            RenderedTurn(False, images),
            RenderedTurn(True, "Received."),
            RenderedTurn(False, text),
        ]


def _encode_headed(
    tokenizer: Any, segments: Sequence[Segment], notation: Notation
) -> EncodedConversation:
    """Return ids and labels of the style "single", with the lengths that LLaVA's trainer computes.

    Each line is tokenised by itself, with its beginning-of-sequence token. With Llama's vocabulary
    that gives as many tokens as the line has within the conversation ("▁###" and the beginning of
    sequence, or "##" and "#"). The first two tokens of each question are learned too: they are the
    mark that ends the answer before it. With other vocabularies the lengths may be off by a token
    for each turn, and so are LLaVA's labels.
    """
    text = "".join(segment.text for segment in segments)
    ids = encode_segments(tokenizer, [Segment(text)], notation).input_ids
    labels = [IGNORED if id_ == IMAGE_PLACEHOLDER else id_ for id_ in ids]
    header, *lines, _ = segments
    place = _count(tokenizer, header.text, notation)
    labels[:place] = [IGNORED] * len(labels[:place])
    for line in lines:
        length = _count(tokenizer, line.text, notation)
        if not line.is_learned:
            masked = labels[place + 2 : place + length]
            labels[place + 2 : place + length] = [IGNORED] * len(masked)
        place += length
    return EncodedConversation(ids, labels)


def _count(tokenizer: Any, text: str, notation: Notation) -> int:
    return len(tokenize_pieces(tokenizer, text, notation.image_token))


def _skip_answer(messages: Sequence[Message]) -> Sequence[Message]:
    roles = [message.role for message in messages]
    if "assistant" in roles and "user" not in roles[: roles.index("assistant")]:
        first = roles.index("assistant")
        return [*messages[:first], *messages[first + 1 :]]
    return messages


def _check_caption(messages: Sequence[Message], sample_id: str) -> None:
    roles = [message.role for message in messages]
    if roles != ["user", "assistant"] or not count_images(messages[:1]):
        raise SampleError(
            f"{name_sample(sample_id)}: the template 'plain' is for captions and takes one user "
            f"message with an image and one answer; this has {len(messages)} messages with "
            f"{count_images(messages)} images: use another template"
        )


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
_WRITE_FIRST = (
    "{% macro write(message) %}{% set number = count(message) | int %}"
    "{% if number == 0 %}{{ join(message) }}"
    "{% else %}{{ ((picture + '\\n') * number + join(message) | trim) | trim }}"
    "{% endif %}{% endmacro %}"
)
"""Images come first."""

_WRITE_INTERLEAVED = (
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
"""A single image moves to the front; several stay where they are (`ListedTemplate._write`)."""

_APART = (
    "{% if loop.first and count(message) | int and join(message) | trim %}"
    "{% for part in range(count(message) | int) %}{{ picture + ('' if loop.last else '\\n') }}"
    "{% endfor %}"
)
"""Tagged images get an exchange of their own, before the question."""


def _write_jinja(template: ListedTemplate) -> str:
    """Return the Jinja source of a template; its text is the same as that of `render`."""
    image = template.tags[0] + template.notation.image + template.tags[1]
    write = _WRITE_INTERLEAVED if template.is_interleaved else _WRITE_FIRST
    source = f"{{% set picture = {_quote(image)} %}}{_JOIN}{_COUNT}{write}"
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


def _write_named(template: ListedTemplate) -> str:
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


def _write_chatml(template: ListedTemplate) -> str:
    after = _say(template.end + template.gap)
    return (
        f"{_system(template.system)}{_say('<|im_start|>system' + chr(10))}{{{{ system }}}}{after}"
        f"{_MESSAGES}{{{{ '<|im_start|>' + message['role'] + '\\n' }}}}{{{{ write(message) }}}}"
        f"{after}{_END}"
        f"{{% if add_generation_prompt %}}{_say('<|im_start|>assistant' + chr(10))}{{% endif %}}"
    )


def _write_llama_2(template: ListedTemplate) -> str:
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
