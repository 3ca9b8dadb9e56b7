"""Logprobs of an answer's tokens, given out together with the text that they stand for.

The sampler measures a token, the sequence that takes it says where its text begins.
"""

from collections import deque
from collections.abc import Callable, Sequence

from llava_ray.types import TokenLogprob


class LogprobStream:
    """Keeps what was measured until the text of the token is shown.

    Args:
        spell: token id -> its bytes.
        num_top: how many of the likeliest tokens are reported in each place.
    """

    def __init__(self, spell: Callable[[int], bytes], *, num_top: int) -> None:
        self.num_top = num_top
        self._spell = spell
        self._measured: TokenLogprob | None = None
        self._kept: deque[tuple[int, TokenLogprob]] = deque()

    def measure(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> None:
        """Note the logprob of the token that was chosen, and the (id, logprob) of the likeliest."""
        spelled = tuple((self._spell(id_), value) for id_, value in top[: self.num_top])
        self._measured = TokenLogprob(self._spell(token_id), logprob, spelled)

    def push(self, place: int) -> None:
        """The measured token is part of the answer; its text begins at this character."""
        assert self._measured is not None
        self._kept.append((place, self._measured))

    def take(self, num_shown: int | None) -> tuple[TokenLogprob, ...]:
        """Return, once, those that begin before character `num_shown`; None: all."""
        taken = []
        while self._kept and (num_shown is None or self._kept[0][0] < num_shown):
            taken.append(self._kept.popleft()[1])
        return tuple(taken)
