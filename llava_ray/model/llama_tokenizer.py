"""Makes Llama's tokenizers give the ids that LLaVA's code gets at the beginning of a text.

The vocabulary is read by transformers. But SentencePiece puts a space before a text, and which
texts get one has changed between versions: LLaVA's code uses the tokenizers of transformers 4.37,
and checkpoints were trained with their ids. Each piece of a prompt between two images is a text of
its own, so nearly every prompt is affected.

    first   one space before the whole text, also if it begins with one (`legacy: false`)
    each    one before each part between special tokens (`legacy: true`, or not said; all of the
            tokenizers in Rust, which LLaVA takes for Mistral)
    never   none: the SentencePiece model itself says so

File formats: tokenizer.model (SentencePiece), tokenizer.json (tokenizers), tokenizer_config.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.locate import REMEDY, read_json

SpaceRule = Literal["first", "each", "never"]

SPACE = "▁"  # how SentencePiece writes a space
_SPELL_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_NORMALIZERS: dict[SpaceRule, dict[str, Any]] = {
    # What begins with a space gets a second one; the pre-tokenizer gives all others their first.
    "first": {"type": "Replace", "pattern": {"Regex": rf"\A(?=[ {SPACE}])"}, "content": SPACE},
    "each": {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": SPACE}, _SPELL_SPACES],
    },
    "never": _SPELL_SPACES,
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def run_as_llava(tokenizer: Any, folder: Path, text_model_type: str) -> Any:
    """Return a tokenizer that gives the ids of LLaVA's code; other kinds are returned unchanged.

    Args:
        tokenizer: transformers', with all tokens added.
        folder: where its files are.
        text_model_type: of the language model.

    Raises:
        ConfigError: a file cannot be read.
    """
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    has_model, has_json = ((folder / f"tokenizer.{end}").is_file() for end in ("model", "json"))
    kind = settings.get("tokenizer_class") or ("LlamaTokenizer" if has_model else "")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if text_model_type not in ("llama", "mistral") or backend is None:
        return tokenizer
    if kind not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return tokenizer
    described = json.loads(backend.to_str())
    is_in_python = text_model_type == "llama" and kind == "LlamaTokenizer" and has_model
    if has_json and not is_in_python:
        _copy_beginnings(described, folder / "tokenizer.json")
    else:
        rule: SpaceRule = "each"
        if is_in_python:
            rule = _read_rule(folder / "tokenizer.model", settings)
        _set_beginnings(described, rule)
        described["decoder"] = _DECODER
    if tokenizer.unk_token in described["model"]["vocab"]:
        described["model"]["unk_token"] = tokenizer.unk_token
    described["post_processor"] = _enclose(
        tokenizer,
        begins=settings.get("add_bos_token", True),
        ends=settings.get("add_eos_token", False),
    )
    return rebuild(tokenizer, described)


def rebuild(tokenizer: Any, described: Mapping[str, Any]) -> Any:
    """Return a copy of a tokenizer with another content of tokenizer.json.

    It has transformers' general class, which can read back everything that it writes.

    Args:
        tokenizer: transformers'.
        described: the new content of its tokenizer.json.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    flags = {token["content"]: token["normalized"] for token in described["added_tokens"]}
    special = {
        name: AddedToken(token, special=True, normalized=flags.get(token, False))
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (token := getattr(tokenizer, name))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        **special,
    )


def _read_rule(model: Path, settings: Mapping[str, Any]) -> SpaceRule:
    from sentencepiece import SentencePieceProcessor

    if settings.get("legacy") is False:
        return "first"
    try:
        pieces: Any = SentencePieceProcessor(model_file=str(model)).EncodeAsPieces("a")
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{model} does not load: {error}; {REMEDY}") from error
    return "each" if pieces[0].startswith(SPACE) else "never"


def _set_beginnings(described: dict[str, Any], rule: SpaceRule) -> None:
    described["normalizer"] = _NORMALIZERS[rule]
    described["pre_tokenizer"] = None
    if rule == "first":
        described["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "first",
            "split": False,
        }
    for token in described["added_tokens"]:
        # What is not normalised is cut out before the normaliser sees the text around it.
        token["normalized"] = rule == "first"


def _copy_beginnings(described: dict[str, Any], file: Path) -> None:
    found = read_json(file)
    for name in ("normalizer", "pre_tokenizer"):
        described[name] = found.get(name)


def _enclose(tokenizer: Any, *, begins: bool, ends: bool) -> dict[str, Any]:
    """Return the post-processor that adds the tokens before and after a text."""
    tokens = [tokenizer.bos_token if begins else None, tokenizer.eos_token if ends else None]

    def write(sequence: str, number: int) -> list[dict[str, Any]]:
        text: dict[str, Any] = {"Sequence": {"id": sequence, "type_id": number}}
        first, last = (
            [{"SpecialToken": {"id": token, "type_id": number}}] if token else []
            for token in tokens
        )
        return [*first, text, *last]

    return {
        "type": "TemplateProcessing",
        "single": write("A", 0),
        "pair": write("A", 0) + write("B", 1),
        "special_tokens": {
            token: {
                "id": token,
                "ids": [tokenizer.convert_tokens_to_ids(token)],
                "tokens": [token],
            }
            for token in tokens
            if token
        },
    }
