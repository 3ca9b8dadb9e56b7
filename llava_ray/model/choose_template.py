"""Chooses the conversation template of a checkpoint.

The last step of `open_checkpoint`. In this order: the template that the caller asks for; the field
`llava_ray_template` of config.json; the checkpoint's own Jinja template; what the rest of
config.json and the tokenizer say about how the language model was trained. Never the folder's name,
by which LLaVA's own code decides.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_ray.errors import ConfigError, RequestError
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.processor import START_END
from llava_ray.template import (
    OTHER_NAMES,
    TEMPLATES,
    Notation,
    OwnTemplate,
    Template,
    find_template,
)
from llava_ray.types import ImagePart, Message, TextPart

OWN = "own"
"""The name that asks for the template that comes with the checkpoint."""

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_LLAMA_2_CHAT = re.compile(r"llama-?2.*chat", re.IGNORECASE)
_FIRST_LLAVA = re.compile(r"(vicuna|llava).*-v0\b(?!\.)", re.IGNORECASE)


def choose_template(checkpoint: Checkpoint, processor: Any, name: str | None) -> Template:
    """Return the template for a checkpoint.

    Args:
        checkpoint: the inspected checkpoint.
        processor: its processor.
        name: of a template, or "own"; None: the one that the files point to.

    Raises:
        ConfigError: there is no template of that name, or the checkpoint has none of its own.
    """
    notation = _read_notation(checkpoint, processor)
    own = _read_own(checkpoint, processor, notation)
    named = name or checkpoint.template
    if named == OWN and own is None:
        raise ConfigError(
            f"template={OWN!r}: {str(checkpoint.folder)!r} has no chat template of its own: give "
            f"one of {', '.join(TEMPLATES)}"
        )
    if own is not None and named in (None, OWN):
        problem = find_template_fault(own)
        # A language model's template, which came with its tokenizer, says nothing of images.
        if problem and (named == OWN or checkpoint.format == "hf"):
            raise ConfigError(
                f"the chat template of {str(checkpoint.folder)!r} {problem}: give the template "
                f"that it was trained with by name, one of {', '.join(TEMPLATES)}"
            )
        if not problem:
            return own
    if named is None:
        named = guess_template(checkpoint.metadata, processor.tokenizer)
    if named is None:
        raise ConfigError(
            f"{str(checkpoint.folder)!r} does not say which conversation template its language "
            f"model ({checkpoint.text_model_type}, whose answers end with "
            f"{processor.tokenizer.eos_token!r}) was trained with: give it as template, one of "
            f"{', '.join(TEMPLATES)}"
        )
    check_template_name(name)
    try:
        return replace(find_template(named), notation=notation)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint.folder / 'config.json'} (llava_ray_template): {error.message}; correct "
            "it there or give a template by name"
        ) from error


def find_template_fault(template: Template) -> str:
    """Return what is wrong with a checkpoint's template, found by rendering images; "" if nothing.

    A template for text alone writes a list of parts as text, or fails on it.
    """
    for num_images in (1, 2):
        parts = (*[ImagePart(b"")] * num_images, TextPart("What is this?"))
        try:
            template.render([Message("user", parts)])
        except RequestError as error:
            return f"cannot render an image ({error.message.partition(';')[0]})"
    return ""


def check_template_name(name: str | None) -> None:
    """Check that a template that was asked for exists.

    Raises:
        ConfigError: there is no template of that name.
    """
    if name in (None, OWN):
        return
    try:
        find_template(name)
    except ConfigError as error:
        raise ConfigError(f"template={name!r}: {error.message}") from error


def guess_template(metadata: Mapping[str, str], tokenizer: Any) -> str | None:
    """Return the name of the template that a language model was trained with; None: unknown.

    Args:
        metadata: see `Checkpoint.metadata`.
        tokenizer: its end-of-sequence token tells ChatML from the rest.
    """
    text, base = metadata.get("text_model_type", ""), metadata.get("base_model", "")
    if (version := metadata.get("version", "")) in (*TEMPLATES, *OTHER_NAMES):
        return version
    if text == "mpt":
        return "mpt"
    if tokenizer.eos_token == _CHATML_TOKENS[1]:
        return "qwen" if text.startswith("qwen") else "chatml_direct"
    if text.startswith("qwen"):
        return "qwen"
    if text == "mistral":
        return "mistral_instruct"
    if _LLAMA_2_CHAT.search(base):
        return "llava_llama_2"
    if _FIRST_LLAVA.search(base):
        return "llava_v0"
    # Llama and Llama 2, as LLaVA was trained on them; Llama 3 has another end of sequence.
    is_first_llama = text in ("llama", "") and tokenizer.eos_token == "</s>"
    return "vicuna_v1" if is_first_llama else None


def find_stop_ids(template: Template, tokenizer: Any) -> frozenset[int]:
    """Return the ids of a template's stop texts that are tokens of their own.

    Such a token may be special, and is then never part of the decoded text.
    """
    tokens = tokenizer.get_added_vocab()
    return frozenset(tokens[text] for text in template.stop if text in tokens)


def _read_notation(checkpoint: Checkpoint, processor: Any) -> Notation:
    tokenizer = processor.tokenizer
    chatml = [token for token in _CHATML_TOKENS if token in tokenizer.get_added_vocab()]
    special = [processor.image_token, *tokenizer.all_special_tokens, *chatml]
    return Notation(
        image_token=processor.image_token,
        marks=START_END if checkpoint.uses_start_end else ("", ""),
        special_tokens=tuple(dict.fromkeys(special)),
        in_pieces=checkpoint.in_pieces,
    )


def _read_own(checkpoint: Checkpoint, processor: Any, notation: Notation) -> OwnTemplate | None:
    """Return the Jinja template that comes with a checkpoint, if there is one."""
    source = processor.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    variables = tuple((name, getattr(processor.tokenizer, name) or "") for name in names)
    return OwnTemplate(source=source, variables=variables, notation=notation)
