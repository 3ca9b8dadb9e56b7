"""Incremental detokenization: token ids -> text that is final, with the logprobs that belong to it.

The last step before an engine yields a chunk. Each answer owns a `Detokenizer`, which holds text
back while it ends within a character or may be the beginning of a stop text. If logprobs are asked
for, it also owns a `LogprobCollector`, which holds them back until their text is returned.
"""

from collections import deque
from collections.abc import Callable, Sequence

from llava_ray.types import TokenLogprob

UNFINISHED = "\ufffd"  # what tokenizers write for bytes that are not a complete character


class Detokenizer:
    """Decodes one answer token by token.

    A token may end within a character, and its text may depend on the token before it. So a window
    of the last tokens is decoded with and without the new one, and the difference is the new text,
    once it no longer ends within a character.

    Args:
        decode: token ids -> text.
        stop: the answer ends before the first of these texts.

    Attributes:
        is_stopped: whether a stop text was found; the returned text ends before it.
        num_decoded: characters so far, including those held back.
        num_returned: characters returned so far.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self.num_decoded = 0
        self.num_returned = 0
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window that are decoded already
        self._shown = ""  # their text
        self._held = ""  # decoded text that may be the beginning of a stop text

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Return the text that this token makes final; often empty.

        Args:
            token_id: the next token of the answer.
            may_stop: False: ignore stop texts that end in this token (see `Sampling.min_tokens`).
        """
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(UNFINISHED):
            return ""
        new = text[len(self._shown) :]
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)
        return self._hold_back(new, may_stop=may_stop)

    def flush(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        if self.is_stopped:
            return ""
        rest = self._decode(self._window)[len(self._shown) :]
        text = self._hold_back(rest)
        held = "" if self.is_stopped else self._held
        self.num_returned += len(held)
        self._window, self._num_shown, self._shown, self._held = [], 0, "", ""
        return text + held

    def _hold_back(self, new: str, *, may_stop: bool = True) -> str:
        text = self._cut(new) if self._stop and may_stop else new
        self.num_decoded += len(new)
        self.num_returned += len(text)
        return text

    def _cut(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class LogprobCollector:
    """Holds the logprobs of one answer's tokens until the text of those tokens is returned.

    For each token, `measure` comes first, then `push` if the token is part of the answer.

    Args:
        spell: token id -> its bytes.
        num_top: how many of the most likely tokens to report at each position.
    """

    def __init__(self, spell: Callable[[int], bytes], *, num_top: int) -> None:
        self.num_top = num_top
        self._spell = spell
        self._measured: TokenLogprob | None = None
        self._kept: deque[tuple[int, TokenLogprob]] = deque()

    def measure(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> None:
        """Record the logprob of the chosen token, and (id, logprob) of the most likely ones."""
        spelled = tuple((self._spell(id_), value) for id_, value in top[: self.num_top])
        self._measured = TokenLogprob(self._spell(token_id), logprob, spelled)

    def push(self, place: int) -> None:
        """Add the measured token to the answer; its text begins at character `place`."""
        assert self._measured is not None
        self._kept.append((place, self._measured))

    def take(self, num_shown: int | None) -> tuple[TokenLogprob, ...]:
        """Remove and return those whose text begins before character `num_shown`; None: all."""
        taken = []
        while self._kept and (num_shown is None or self._kept[0][0] < num_shown):
            taken.append(self._kept.popleft()[1])
        return tuple(taken)
