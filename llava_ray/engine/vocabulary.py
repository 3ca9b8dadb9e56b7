"""A model's tokens as bytes, and what follows from that: how they are spelled, grammars over them.

llguidance reads transformers' fast tokenizers, byte-level and with byte fallback. That takes up to
a second, so a vocabulary is made when the first request needs it.
"""

from typing import Any

from llguidance import LLMatcher, hf

from llava_ray.engine.grammar import Grammar
from llava_ray.errors import RequestError, UnsupportedError

_WHITE_SPACE = r"[ \n]{1,20}"  # between the parts of JSON: enough to indent, and it ends


class Vocabulary:
    """What each token id of a model stands for.

    Args:
        tokenizer: transformers' tokenizer.
        size: length of the model's logits.
        eos_token_ids: an answer ends at any of these.

    Raises:
        UnsupportedError: this tokenizer does not tell.
    """

    def __init__(self, tokenizer: Any, *, size: int, eos_token_ids: frozenset[int]) -> None:
        self._num_named = len(tokenizer)  # logits are often rounded up to more
        try:
            self._tokens = hf.from_tokenizer(
                tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=sorted(eos_token_ids)
            )
        except ValueError as error:
            raise UnsupportedError(
                f"the tokenizer of this model does not tell what its tokens stand for ({error}): "
                "ask without logprobs and response_format"
            ) from error

    def compile(self, schema: str) -> Grammar:
        """Return the grammar of the JSON texts that a JSON schema describes.

        Raises:
            RequestError: the schema is wrong, or uses what llguidance does not know.
        """
        problem = ""
        try:
            source = LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": _WHITE_SPACE}
            )
            matcher = LLMatcher(self._tokens, source, log_level=0)
            problem = matcher.get_error()
            if not problem:
                return Grammar(matcher)
        except ValueError as error:
            problem = str(error)
        raise RequestError(
            f"the JSON schema cannot be held to: {problem[:500]}; change it, or leave "
            "response_format out",
            param="response_format",
        )

    def spell(self, token_id: int) -> bytes:
        """Return the bytes of a token; they may be a part of a character."""
        return self._tokens.decode_bytes([token_id]) if token_id < self._num_named else b""
