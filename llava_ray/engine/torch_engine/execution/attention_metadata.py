"""Where attention finds what sequences with one new token each have to see: tensors, no kernels.

Shapes: B sequences, N places of the cache, T tokens of a step, W of them wanted, H query heads,
K kv heads, E head size.
"""

from typing import NamedTuple, Protocol

import torch


class AttentionMetadata(Protocol):
    """What a language model needs to know of the tokens of a step.

    Attributes:
        positions_T: of each token in its sequence.
        wanted: the W tokens whose last hidden states are asked for; None: all.
        rotate_and_attend: does more than `attend` in one call, where it can; see `RotateAndAttend`.
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
        """Store the step's keys and values, let each token attend to its own sequence.

        Args:
            window: each token sees this many tokens up to itself (sliding window); None: all.
            is_last: of all layers; only the wanted tokens attend, whose queries are given.

        Returns:
            [T, H, E], or [W, H, E]
        """
        ...


class RotateAndAttend(Protocol):
    """Rotates queries and keys, stores keys and values, lets each token attend, in one call."""

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
            heads_TX: queries, keys and values, [T, (H + 2 K) * E], float32 or bfloat16.
            rotations_T1C: of each token, for pairs of neighbours; C = E/2.
            window: see `AttentionMetadata.attend`.
        """
        ...


class KVRows(NamedTuple):
    """Where the keys and values of B sequences are in a pool of [N * K, E]; int64, [B].

    Attributes:
        tokens: which token of the step is the sequence's.
        firsts: the row of each one's first kv head and first token to be seen.
        sizes: rows from one of its kv heads to the next.
        lengths: tokens to be seen.
    """

    tokens: torch.Tensor
    firsts: torch.Tensor
    sizes: torch.Tensor
    lengths: torch.Tensor


class DecodeMetadata:
    """Sequences with one new token each, whose keys and values are anywhere in the cache.

    Args:
        tokens: which token of the step is the sequence's; int64, [B], as all of these.
        starts: first slot of each sequence's KV slice.
        sizes: length of that slice.
        lengths: its tokens, the new one among them.
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
        """Return what the new tokens see if each sees `window` tokens up to itself; None: all."""
        if window not in self._windows:
            skipped = (self._all.lengths - (window or 0)).clamp(min=0)
            self._windows[window] = self._all._replace(
                firsts=self._all.firsts + skipped, lengths=self._all.lengths - skipped
            )
        return self._windows[window]
