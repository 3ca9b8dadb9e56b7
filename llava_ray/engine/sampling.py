"""Logits -> the next token of each sequence: greedy, or drawn with its own random number.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Sequence as Many

import torch

from llava_ray.engine.sequence import Sequence


def sample(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    """Choose one token for each row.

    A row that is drawn takes one number of its sequence's own random source and looks it up in
    its own distribution: what else is in the batch does not change the outcome.
    """
    tokens = logits_BV.argmax(-1).tolist()
    drawn = [i for i, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    if drawn:
        chosen = _draw(logits_BV[drawn], [sequences[i] for i in drawn])
        for i, token in zip(drawn, chosen, strict=True):
            tokens[i] = token
    return tokens


def _draw(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    def column(numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, device=logits_BV.device)[:, None]

    temperature_B1 = column([sequence.sampling.temperature for sequence in sequences])
    top_p_B1 = column([sequence.sampling.top_p for sequence in sequences])
    uniform_B1 = column([sequence.random.random() for sequence in sequences])
    probabilities_BV = (logits_BV.float() / temperature_B1).softmax(-1)
    sorted_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    cumulative_BV = sorted_BV.cumsum(-1)
    # nucleus: the fewest tokens that together reach top_p, at least one
    kept_BV = sorted_BV * (cumulative_BV - sorted_BV < top_p_B1)
    cumulative_BV = kept_BV.cumsum(-1)
    target_B1 = uniform_B1 * cumulative_BV[:, -1:]
    rank_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = (kept_BV > 0).sum(-1, keepdim=True) - 1
    return ids_BV.gather(1, torch.minimum(rank_B1, last_B1))[:, 0].tolist()
