"""Structured output: the bytes of each token, and which tokens a JSON schema allows next.

`Vocabulary` knows the bytes of every token: `spell` returns them for logprobs, and `compile` turns
a JSON schema into a `Grammar`. The sampler asks the grammar which tokens are allowed next, and the
sequence tells it which one was chosen. Requests go through `GrammarCompiler`, which bounds what a
schema may cost.

llguidance reads transformers' fast tokenizers (byte-level, or with byte fallback). That takes up to
a second, so a `Vocabulary` is built when the first request needs it.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from llguidance import LLMatcher, hf

from llava_ray.engine.schema_check import find_problem, make_grammar
from llava_ray.errors import RequestError, UnsupportedError

logger = logging.getLogger(__name__)

_NUM_KEPT = 8
"""Schemas whose outcome is kept; each grammar may take half a GiB."""

_NUM_CHECKS_AT_ONCE = 2


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

        The work is not bounded: see `GrammarCompiler`.

        Raises:
            RequestError: the schema is invalid, or uses features that llguidance lacks.
        """
        try:
            matcher = LLMatcher(self._tokens, make_grammar(schema), log_level=0)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        else:
            if not problem:
                return Grammar(matcher)
        raise _refuse(problem)

    def spell(self, token_id: int) -> bytes:
        """Return the bytes of a token; they may be only part of a character."""
        return self._tokens.decode_bytes([token_id]) if token_id < self._num_named else b""


class GrammarCompiler:
    """Compiles the schemas of requests; neither a hostile schema nor a repeated one costs much.

    Each new schema is checked in a process with bounds on time and memory, then compiled in a
    thread of its own, so that other requests are encoded meanwhile.

    Args:
        read_vocabulary: returns the model's vocabulary; called in a thread, when first needed.
    """

    def __init__(self, read_vocabulary: Callable[[], Vocabulary]) -> None:
        self._read_vocabulary = read_vocabulary
        self._kept: OrderedDict[str, Grammar | str] = OrderedDict()  # a text says what is wrong
        self._gate = asyncio.Semaphore(_NUM_CHECKS_AT_ONCE)

    async def compile(self, schema: str) -> "Grammar":
        """Return a grammar in its initial state.

        Raises:
            RequestError: the schema is invalid, takes too long to compile, or uses features that
                llguidance lacks.
            UnsupportedError: the model's tokenizer cannot be read.
        """
        if schema not in self._kept:
            async with self._gate:
                if schema not in self._kept:
                    self._keep(schema, await self._compile(schema))
        self._kept.move_to_end(schema)
        outcome = self._kept[schema]
        if isinstance(outcome, str):
            raise _refuse(outcome)
        return outcome.copy()

    async def _compile(self, schema: str) -> "Grammar | str":
        vocabulary = await asyncio.to_thread(self._read_vocabulary)
        if problem := await find_problem(schema):
            return problem
        return await asyncio.to_thread(vocabulary.compile, schema)

    def _keep(self, schema: str, outcome: "Grammar | str") -> None:
        self._kept[schema] = outcome
        while len(self._kept) > _NUM_KEPT:
            self._kept.popitem(last=False)


def _refuse(problem: str) -> RequestError:
    return RequestError(
        f"the JSON schema cannot be enforced: {problem[:500]}; change it, or leave response_format "
        "out",
        param="response_format",
    )


class Grammar:
    """How far one answer has come in its grammar.

    Args:
        matcher: llguidance's matcher, in its initial state.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> "Grammar":
        """Return a grammar that has come as far and advances by itself."""
        return Grammar(self._matcher.deep_copy())

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
