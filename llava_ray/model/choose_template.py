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

from llava_ray.errors import ConfigError
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
    if named == OWN or (named is None and own is not None):
        if own is None:
            raise ConfigError(
                f"template={OWN!r}: {str(checkpoint.folder)!r} has no chat template that supports "
                f"images: give one of {', '.join(TEMPLATES)}"
            )
        return own
    if named is None:
        named = guess_template(checkpoint.metadata, processor.tokenizer)
    check_template_name(name)
    try:
        return replace(find_template(named), notation=notation)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint.folder / 'config.json'} (llava_ray_template): {error.message}; correct "
            "it there or give a template by name"
        ) from error


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


def guess_template(metadata: Mapping[str, str], tokenizer: Any) -> str:
    """Return the name of the template that a language model was most likely trained with.

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
    return "vicuna_v1"


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
    """Return the checkpoint's Jinja template, unless it is that of a language model alone."""
    source = processor.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source or (checkpoint.format == "llava" and "image" not in source):
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    variables = tuple((name, getattr(processor.tokenizer, name) or "") for name in names)
    return OwnTemplate(source=source, variables=variables, notation=notation)
