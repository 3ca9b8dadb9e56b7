"""Logits -> the next token of each sequence: greedy, or drawn with its own random number.

Nothing here waits for the device: `SampledTokens.read` does, when the tokens are wanted.

Shapes: B sequences, V vocabulary, A of the sequences that ask for logprobs.
"""

from collections.abc import Sequence as Many

import torch

from llava_ray.engine.torch_engine.execution.device_transfer import DeviceToHostCopy, send
from llava_ray.engine.torch_engine.execution.logits_processors import adjust
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence


class SampledTokens:
    """A token for each of B sequences, on its way from the device.

    Args:
        tokens_B: on the device, as the next ones.
        is_possible_B: whether each token's logit is a number; it is not if a sequence's logits are
            all infinite or NaN.
        sequences: whose they are.
        measured: of those that ask for it, in order, the logprobs of their tokens [A], and the
            likeliest ids and their logprobs, [A, top]; empty if none asks.
    """

    def __init__(
        self,
        tokens_B: torch.Tensor,
        is_possible_B: torch.Tensor,
        sequences: Many[Sequence],
        measured: tuple[torch.Tensor, ...],
    ) -> None:
        self.tokens_B = tokens_B
        self.rows = {sequence: row for row, sequence in enumerate(sequences)}
        self._fetch = DeviceToHostCopy(tokens_B, is_possible_B, *measured)

    def read(self) -> list[int]:
        """Return the tokens, and tell the sequences how likely they were, or that they failed."""
        tokens_B, is_possible_B, *measured = self._fetch.read()
        tokens: list[int] = tokens_B.tolist()
        for sequence, is_possible in zip(self.rows, is_possible_B.tolist(), strict=True):
            if not is_possible:
                sequence.failure = "the model's logits for it are not finite"
        if measured:
            asking = [(row, s.logprobs) for s, row in self.rows.items() if s.logprobs is not None]
            columns = [each.tolist() for each in measured]
            for (row, stream), logprob, ids, values in zip(asking, *columns, strict=True):
                stream.measure(tokens[row], logprob, list(zip(ids, values, strict=True)))
        return tokens


def sample(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> SampledTokens:
    """Choose one token for each row.

    A row that is drawn takes one number of its sequence's own random source and looks it up in
    its own distribution: what else is in the batch does not change the outcome. Greedy rows that
    ask for nothing more cost no more than the search for their largest logit.
    """
    tokens_B = logits_BV.argmax(-1)
    special = [i for i, s in enumerate(sequences) if s.has_own_logits or not s.sampling.is_greedy]
    if special:
        rows = send(special, logits_BV.device)
        tokens_B[rows] = _choose(logits_BV[rows].float(), [sequences[i] for i in special])
    is_possible_B = logits_BV.gather(1, tokens_B[:, None])[:, 0].isfinite()
    measured = _measure(logits_BV, tokens_B, sequences)
    return SampledTokens(tokens_B, is_possible_B, sequences, measured)


def _measure(
    logits_BV: torch.Tensor, tokens_B: torch.Tensor, sequences: Many[Sequence]
) -> tuple[torch.Tensor, ...]:
    """Return the logprobs of the tokens and of the most likely ones; see `SampledTokens`."""
    asking = [i for i, sequence in enumerate(sequences) if sequence.logprobs is not None]
    if not asking:
        return ()
    num_top = max(s.logprobs.num_top for s in sequences if s.logprobs is not None)
    rows = send(asking, logits_BV.device)
    logprobs_AV = logits_BV[rows].float().log_softmax(-1)
    chosen_A = logprobs_AV.gather(1, tokens_B[rows][:, None])[:, 0]
    best = logprobs_AV.topk(num_top, dim=-1)
    return chosen_A, best.indices, best.values


def _choose(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> torch.Tensor:
    adjust(logits_BV, sequences)
    tokens_B = logits_BV.argmax(-1)
    drawn = [i for i, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
    if drawn:
        rows = send(drawn, logits_BV.device)
        tokens_B[rows] = _draw(logits_BV[rows], [sequences[i] for i in drawn])
    return tokens_B


def _draw(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> torch.Tensor:
    asked = [sequence.sampling for sequence in sequences]

    def column(numbers: list[float]) -> torch.Tensor:
        return send(numbers, logits_BV.device)[:, None]

    temperature_B1 = column([sampling.temperature for sampling in asked])
    top_p_B1 = column([sampling.top_p for sampling in asked])
    uniform_B1 = column([sequence.random.random() for sequence in sequences])
    probabilities_BV = (logits_BV / temperature_B1).softmax(-1)
    kept_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    if any(sampling.min_p or sampling.top_k for sampling in asked):
        last = logits_BV.shape[1]
        top_k = [min(s.top_k or last, last) for s in asked]
        smallest_B1 = kept_BV.gather(1, send(top_k, ids_BV.device)[:, None] - 1)
        smallest_B1 = smallest_B1.maximum(kept_BV[:, :1] * column([s.min_p for s in asked]))
        kept_BV = kept_BV * (kept_BV >= smallest_B1)
    cumulative_BV = kept_BV.cumsum(-1)
    # nucleus: the fewest tokens that together reach top_p of what is left, at least one
    is_kept_BV = cumulative_BV - kept_BV < top_p_B1 * cumulative_BV[:, -1:]
    is_kept_BV[:, 0] = True
    kept_BV = kept_BV * is_kept_BV
    cumulative_BV = kept_BV.cumsum(-1)
    target_B1 = uniform_B1 * cumulative_BV[:, -1:]
    rank_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = ((kept_BV > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # NaN is not more than 0
    return ids_BV.gather(1, torch.minimum(rank_B1, last_B1))[:, 0]
