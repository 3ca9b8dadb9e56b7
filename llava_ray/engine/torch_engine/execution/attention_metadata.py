"""What attention needs to know of a step's tokens and of where their keys and values are.

Shapes: B sequences, N slots of the cache, T tokens of a step, W of them wanted, H query heads,
K kv heads, E head size.
"""

from typing import NamedTuple, Protocol

import torch


class AttentionMetadata(Protocol):
    """What a language model needs to know of the tokens of a step.

    Attributes:
        positions_T: position of each token in its sequence.
        wanted: indices of the W tokens whose last hidden states are needed; None: all T.
        rotate_and_attend: a faster call in place of `attend`, where there is one.
    """

    positions_T: torch.Tensor  # noqa: N815
    wanted: torch.Tensor | None
    rotate_and_attend: "RotateAndAttend | None"

    def attend(
        self,
        layer: int,
        query_THE: torch.Tensor,
        key_TKE: torch.Tensor,
        value_TKE: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        is_last: bool = False,
    ) -> torch.Tensor:
        """Store the step's keys and values, then let each token attend to its own sequence.

        Args:
            window: each token sees this many tokens, itself included; None: all.
            is_last: this is the last layer: only the wanted tokens attend, and `query_THE` holds
                only their queries.

        Returns:
            [T, H, E], or [W, H, E] for the last layer
        """
        ...


class RotateAndAttend(Protocol):
    """Rotates queries and keys, stores keys and values, and attends, in one call."""

    def __call__(
        self,
        layer: int,
        heads_TX: torch.Tensor,
        rotations_T1C: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Return [T, H * E].

        Args:
            heads_TX: queries, keys and values, [T, (H + 2 K) * E], float32 or bfloat16; in queries
                and keys the two elements of a rotated pair are adjacent.
            rotations_T1C: complex64; each token's rotation of each pair; C = E/2.
            window: see `AttentionMetadata.attend`.
        """
        ...


class KVRows(NamedTuple):
    """Where the keys and values of B sequences are in a pool of [N * K, E]; all int64, [B].

    Attributes:
        tokens: index of the sequence's token in the step.
        firsts: row of its first kv head's first token that is attended to.
        sizes: number of rows from one of its kv heads to the next.
        lengths: number of tokens attended to.
    """

    tokens: torch.Tensor
    firsts: torch.Tensor
    sizes: torch.Tensor
    lengths: torch.Tensor


class DecodeMetadata:
    """B sequences with one new token each; tensors are int64, [B].

    Args:
        tokens: index of the sequence's token in the step.
        starts: first slot of the sequence's slice of the cache.
        sizes: length of that slice.
        lengths: number of the sequence's tokens, including the new one.
        num_kv_heads: K.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        starts: torch.Tensor,
        sizes: torch.Tensor,
        lengths: torch.Tensor,
        *,
        num_kv_heads: int,
    ) -> None:
        self._all = KVRows(tokens, starts * num_kv_heads, sizes, lengths)
        self._windows: dict[int | None, KVRows] = {None: self._all}

    def find_rows(self, window: int | None) -> KVRows:
        """Return the rows that the new tokens attend to: `window` tokens each; None: all."""
        if window not in self._windows:
            skipped = (self._all.lengths - (window or 0)).clamp(min=0)
            self._windows[window] = self._all._replace(
                firsts=self._all.firsts + skipped, lengths=self._all.lengths - skipped
            )
        return self._windows[window]
