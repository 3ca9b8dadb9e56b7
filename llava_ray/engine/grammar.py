"""What an answer in a given format may go on with, token by token.

`vocabulary.py` compiles it from a JSON schema, the sampler asks it for the tokens that are allowed,
the sequence tells it the one that was chosen.
"""

import logging

import numpy as np
from llguidance import LLMatcher

logger = logging.getLogger(__name__)


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
