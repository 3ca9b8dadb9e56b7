"""Makes a tokenizer that gives whole prompts the ids that LLaVA's code computes piece by piece.

For `export`: transformers, vLLM and SGLang tokenise a prompt as one text, LLaVA each piece between
two images by itself. SentencePiece adds a space at the beginning of every text, so that after an
image `\\nWhat` is three tokens in LLaVA and two in the others, and a model answers differently. The
tokenizer made here adds that space itself.
"""

import json
import re
from typing import Any

from llava_ray.errors import ConfigError
from llava_ray.model.llama_tokenizer import SPACE, rebuild
from llava_ray.template import IMAGE_PLACEHOLDER, IMAGE_TOKEN, tokenize_pieces

_PROBES = (
    "USER: <image>\nWhat is this? ASSISTANT:",
    "a <image>b<image> c <image><image>\n\n d",
    "a <image> and <image>  b",
    "<image>",
    "é<image>Ünï",
    "<im_start><image><im_end>\nWhat?",
)


def join_pieces(tokenizer: Any) -> Any:
    """Return a tokenizer that does to whole prompts what `tokenize_pieces` does to their pieces.

    Args:
        tokenizer: of a checkpoint in LLaVA's format, with `<image>` added.

    Raises:
        ConfigError: this is not possible for its kind of tokenizer.
    """
    if agrees(tokenizer, tokenizer):
        return tokenizer
    joined = _add_spaces(tokenizer)
    if joined is None or not agrees(joined, tokenizer):
        raise ConfigError(
            f"the tokenizer ({type(tokenizer).__name__}) treats the beginning of a text in a way "
            "that transformers' format cannot repeat after an image: use --to original"
        )
    return joined


def agrees(whole: Any, pieces: Any) -> bool:
    """Return whether `whole` gives whole prompts the ids that `pieces` gives piece by piece."""
    image_id = pieces.convert_tokens_to_ids(IMAGE_TOKEN)
    for probe in (*_PROBES, f"{_PROBES[0]} yes{pieces.eos_token or ''}{_PROBES[0]}"):
        ids = tokenize_pieces(pieces, probe)
        expected = [image_id if id_ == IMAGE_PLACEHOLDER else id_ for id_ in ids]
        if whole(probe).input_ids != expected:
            return False
        if expected[0] == pieces.bos_token_id:  # as chat templates write it
            written = whole(pieces.bos_token + probe, add_special_tokens=False)
            if written.input_ids != expected:
                return False
    return True


def _add_spaces(tokenizer: Any) -> Any | None:
    """Return the tokenizer with a normaliser that begins each piece with a space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    if (described.get("pre_tokenizer") or {}).get("type") != "Metaspace":
        return None
    # What is not normalised is cut out before the normaliser sees the text around it.
    seen = {IMAGE_TOKEN, tokenizer.bos_token}
    for token in described["added_tokens"]:
        token["normalized"] = token["normalized"] or token["content"] in seen
    begins = [rf"(?<={IMAGE_TOKEN})"]
    if tokenizer.bos_token:
        begins.append(rf"(?<=\A{tokenizer.bos_token})")
    # Some tokenizers use the space that a piece begins with, others always add one.
    is_shared = tokenizer(" a").input_ids == tokenizer("a").input_ids
    follows = rf"(?=[^ {SPACE}])" if is_shared else r"(?=[\s\S])"
    added = "|".join(re.escape(token["content"]) for token in described["added_tokens"])
    rules = [described["normalizer"]] if described.get("normalizer") else []
    for begin in begins:
        place = rf"{begin}{follows}(?!{added})"
        rules.append({"type": "Replace", "pattern": {"Regex": place}, "content": SPACE})
    described["normalizer"] = {"type": "Sequence", "normalizers": rules}
    return rebuild(tokenizer, described)
