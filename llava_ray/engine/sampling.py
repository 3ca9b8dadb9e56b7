"""Logits -> the next token of each sequence: greedy, or drawn with its own random number.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Sequence as Many

import torch

from llava_ray.engine.adjust import adjust
from llava_ray.engine.sequence import Sequence


def sample(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    """Choose one token for each row.

    A row that is drawn takes one number of its sequence's own random source and looks it up in
    its own distribution: what else is in the batch does not change the outcome. Greedy rows that
    ask for nothing more cost no more than the search for their largest logit.
    """
    tokens = logits_BV.argmax(-1).tolist()
    special = [i for i, s in enumerate(sequences) if s.has_own_logits or not s.sampling.is_greedy]
    if special:
        chosen = _choose(logits_BV[special].float(), [sequences[i] for i in special])
        for i, token in zip(special, chosen, strict=True):
            tokens[i] = token
    asking = [i for i, sequence in enumerate(sequences) if sequence.logprobs is not None]
    if asking:
        _measure(logits_BV[asking], [tokens[i] for i in asking], [sequences[i] for i in asking])
    return tokens


def _measure(logits_BV: torch.Tensor, tokens: list[int], sequences: Many[Sequence]) -> None:
    """Tell the sequences how likely their tokens, and the likeliest ones, were to the model."""
    streams = [sequence.logprobs for sequence in sequences if sequence.logprobs is not None]
    logprobs_BV = logits_BV.float().log_softmax(-1)
    chosen_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
    chosen = logprobs_BV.gather(1, chosen_B1)[:, 0].tolist()
    best = logprobs_BV.topk(max(stream.num_top for stream in streams), dim=-1)
    rows = zip(streams, tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    for stream, token, logprob, ids, values in rows:
        stream.measure(token, logprob, list(zip(ids, values, strict=True)))


def _choose(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    adjust(logits_BV, sequences)
    tokens = logits_BV.argmax(-1).tolist()
    drawn = [i for i, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
    if drawn:
        chosen = _draw(logits_BV[drawn], [sequences[i] for i in drawn])
        for i, token in zip(drawn, chosen, strict=True):
            tokens[i] = token
    return tokens


def _draw(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    asked = [sequence.sampling for sequence in sequences]

    def column(numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, device=logits_BV.device)[:, None]

    temperature_B1 = column([sampling.temperature for sampling in asked])
    top_p_B1 = column([sampling.top_p for sampling in asked])
    uniform_B1 = column([sequence.random.random() for sequence in sequences])
    probabilities_BV = (logits_BV / temperature_B1).softmax(-1)
    kept_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    if any(sampling.min_p or sampling.top_k for sampling in asked):
        last = logits_BV.shape[1]
        top_k_B1 = torch.tensor([min(s.top_k or last, last) for s in asked])[:, None]
        smallest_B1 = kept_BV.gather(1, top_k_B1.to(ids_BV.device) - 1)
        smallest_B1 = smallest_B1.maximum(kept_BV[:, :1] * column([s.min_p for s in asked]))
        kept_BV = kept_BV * (kept_BV >= smallest_B1)
    cumulative_BV = kept_BV.cumsum(-1)
    # nucleus: the fewest tokens that together reach top_p of what is left, at least one
    kept_BV = kept_BV * (cumulative_BV - kept_BV < top_p_B1 * cumulative_BV[:, -1:])
    cumulative_BV = kept_BV.cumsum(-1)
    target_B1 = uniform_B1 * cumulative_BV[:, -1:]
    rank_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = (kept_BV > 0).sum(-1, keepdim=True) - 1
    return ids_BV.gather(1, torch.minimum(rank_B1, last_B1))[:, 0].tolist()
