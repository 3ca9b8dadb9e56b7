"""Logits -> the next token of each sequence: the likeliest one, or one drawn at random.

Only `SampledTokens.read` waits for the device; everything else is asynchronous.

Shapes: B sequences, V vocabulary, A sequences that ask for logprobs.
"""

from collections.abc import Sequence as Many

import torch

from llava_ray.engine.torch_engine.execution.device_transfer import DeviceToHostCopy, send
from llava_ray.engine.torch_engine.execution.logits_processors import adjust
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence


class SampledTokens:
    """One token for each of B sequences, being copied from the device.

    Args:
        tokens_B: the token ids, on the device.
        is_finite_B: whether each token's logit is finite, on the device. It is not if the
            sequence's logits are all infinite or NaN.
        sequences: the sequences, in the order of the rows.
        logprobs: for the sequences that ask for logprobs, in order: the logprob of each chosen
            token [A], and the ids and logprobs of the likeliest tokens [A, top]. Empty if no
            sequence asks.
    """

    def __init__(
        self,
        tokens_B: torch.Tensor,
        is_finite_B: torch.Tensor,
        sequences: Many[Sequence],
        logprobs: tuple[torch.Tensor, ...],
    ) -> None:
        self.tokens_B = tokens_B
        self.rows = {sequence: row for row, sequence in enumerate(sequences)}
        self._copy = DeviceToHostCopy(tokens_B, is_finite_B, *logprobs)

    def read(self) -> list[int]:
        """Wait for the copy; return the tokens, and record logprobs and failures in sequences."""
        tokens_B, is_finite_B, *logprobs = self._copy.read()
        tokens: list[int] = tokens_B.tolist()
        for sequence, is_finite in zip(self.rows, is_finite_B.tolist(), strict=True):
            if not is_finite:
                sequence.failure = "the model's logits for it are not finite"
        if logprobs:
            asking = [(row, s.logprobs) for s, row in self.rows.items() if s.logprobs is not None]
            columns = [each.tolist() for each in logprobs]
            for (row, stream), logprob, ids, values in zip(asking, *columns, strict=True):
                stream.measure(tokens[row], logprob, list(zip(ids, values, strict=True)))
        return tokens


def sample(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> SampledTokens:
    """Choose one token for each row.

    A sampled row takes one number from its sequence's own random generator and looks it up in its
    own distribution, so the rest of the batch does not change the outcome. A plain greedy row costs
    one argmax.
    """
    tokens_B = logits_BV.argmax(-1)
    special = [i for i, s in enumerate(sequences) if s.has_own_logits or not s.sampling.is_greedy]
    if special:
        rows = send(special, logits_BV.device)
        tokens_B[rows] = _choose(logits_BV[rows].float(), [sequences[i] for i in special])
    is_finite_B = logits_BV.gather(1, tokens_B[:, None])[:, 0].isfinite()
    logprobs = _measure(logits_BV, tokens_B, sequences)
    return SampledTokens(tokens_B, is_finite_B, sequences, logprobs)


def _measure(
    logits_BV: torch.Tensor, tokens_B: torch.Tensor, sequences: Many[Sequence]
) -> tuple[torch.Tensor, ...]:
    """Return the `logprobs` argument of `SampledTokens`."""
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
    # Nucleus sampling: the fewest tokens whose probabilities reach top_p of the rest's sum.
    is_kept_BV = cumulative_BV - kept_BV < top_p_B1 * cumulative_BV[:, -1:]
    is_kept_BV[:, 0] = True
    kept_BV = kept_BV * is_kept_BV
    cumulative_BV = kept_BV.cumsum(-1)
    target_B1 = uniform_B1 * cumulative_BV[:, -1:]
    rank_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = ((kept_BV > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # -1 where all are NaN
    return ids_BV.gather(1, torch.minimum(rank_B1, last_B1))[:, 0]
