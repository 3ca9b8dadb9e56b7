"""What an answer in a given format may go on with, token by token.

`Vocabulary.compile` turns a JSON schema into a `Grammar`; the sampler asks the grammar which tokens
are allowed next, and the sequence tells it which one was chosen.

llguidance reads transformers' fast tokenizers (byte-level and byte fallback). That takes up to a
second, so a vocabulary is made when the first request needs it.
"""

import logging
from typing import Any

import numpy as np
from llguidance import LLMatcher, hf

from llava_ray.errors import RequestError, UnsupportedError

logger = logging.getLogger(__name__)

_WHITE_SPACE = r" "  # one at most between the parts of JSON: a weak model may not end with more


class Grammar:
    """The state of one answer in its format.

    Args:
        matcher: llguidance's, at the beginning.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        """Nothing can follow any more."""
        return self._matcher.is_stopped()

    @property
    def is_broken(self) -> bool:
        """It became too complex to go on; the answer is not whole."""
        return self._matcher.is_error()

    def list_allowed(self) -> np.ndarray:
        """Return for each token id whether the answer may go on with it; bool [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little").view(bool)

    def accept(self, token_id: int) -> None:
        """Go on with a token."""
        self._matcher.consume_token(token_id)
        if self.is_broken:
            logger.warning("an answer was cut short: %s", self._matcher.get_error())


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
        try:
            source = LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": _WHITE_SPACE}
            )
            matcher = LLMatcher(self._tokens, source, log_level=0)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        else:
            if not problem:
                return Grammar(matcher)
        raise RequestError(
            f"the JSON schema cannot be held to: {problem[:500]}; change it, or leave "
            "response_format out",
            param="response_format",
        )

    def spell(self, token_id: int) -> bytes:
        """Return the bytes of a token; they may be a part of a character."""
        return self._tokens.decode_bytes([token_id]) if token_id < self._num_named else b""
