"""Structured output: the bytes of each token, and which tokens a JSON schema allows next.

`Vocabulary` knows the bytes of every token: `spell` returns them for logprobs, and `compile` turns
a JSON schema into a `Grammar`. The sampler asks the grammar which tokens are allowed next, and the
sequence tells it which one was chosen.

llguidance reads transformers' fast tokenizers (byte-level, or with byte fallback). That takes up to
a second, so a `Vocabulary` is built when the first request needs it.
"""

import logging
from typing import Any

import numpy as np
from llguidance import LLMatcher, hf

from llava_ray.errors import RequestError, UnsupportedError

logger = logging.getLogger(__name__)

_WHITE_SPACE = r" "  # at most one space between JSON tokens: weak models would go on for ever


class Vocabulary:
    """The bytes of each token id of a model.

    Args:
        tokenizer: transformers' tokenizer.
        size: V, the length of the model's logits.
        eos_token_ids: an answer ends at any of these.

    Raises:
        UnsupportedError: llguidance cannot read this tokenizer.
    """

    def __init__(self, tokenizer: Any, *, size: int, eos_token_ids: frozenset[int]) -> None:
        self._num_named = len(tokenizer)  # the logits are often padded to a rounder size
        try:
            self._tokens = hf.from_tokenizer(
                tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=sorted(eos_token_ids)
            )
        except ValueError as error:
            raise UnsupportedError(
                f"the bytes of this model's tokens cannot be read from its tokenizer ({error}): "
                "send the request without logprobs and response_format"
            ) from error

    def compile(self, schema: str) -> "Grammar":
        """Return a grammar that accepts the JSON texts that a schema describes.

        Raises:
            RequestError: the schema is invalid, or uses features that llguidance lacks.
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
            f"the JSON schema cannot be enforced: {problem[:500]}; change it, or leave "
            "response_format out",
            param="response_format",
        )

    def spell(self, token_id: int) -> bytes:
        """Return the bytes of a token; they may be only part of a character."""
        return self._tokens.decode_bytes([token_id]) if token_id < self._num_named else b""


class Grammar:
    """How far one answer has come in its grammar.

    Args:
        matcher: llguidance's matcher, in its initial state.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        """Whether the answer must end here."""
        return self._matcher.is_stopped()

    @property
    def is_broken(self) -> bool:
        """Whether the matcher gave up, as on a grammar too complex; the answer is incomplete."""
        return self._matcher.is_error()

    def list_allowed(self) -> np.ndarray:
        """Return for each token id whether it may come next; bool [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little").view(bool)

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token."""
        self._matcher.consume_token(token_id)
        if self.is_broken:
            logger.warning("a JSON answer was cut short: %s", self._matcher.get_error())
