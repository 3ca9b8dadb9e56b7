"""Changes logits before a token is chosen, as its sequence asks: grammar, bias, penalties.

Called by `sampler.sample`. The steps and their order are vLLM's; the repetition penalty is
transformers'. Each row depends on its own sequence only, so the rest of the batch never changes an
outcome.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Many

import torch

from llava_ray.engine.torch_engine.execution.device_transfer import send
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence


def adjust(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> None:
    """Change float32 logits in place, each row as its sequence asks."""
    _apply_grammar(logits_BV, sequences)
    _forbid_end_tokens(logits_BV, sequences)
    _add_bias(logits_BV, sequences)
    _penalise(logits_BV, sequences)


def _apply_grammar(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> None:
    size = logits_BV.shape[1]
    for logits_V, sequence in zip(logits_BV, sequences, strict=True):
        if sequence.grammar is not None:
            allowed_V = send(sequence.grammar.list_allowed()[:size], logits_V.device)
            logits_V.masked_fill_(~allowed_V, float("-inf"))


def _forbid_end_tokens(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> None:
    """Forbid end tokens before `min_tokens`, unless no other token is allowed."""
    forbidden = [
        (row, id_)
        for row, sequence in enumerate(sequences)
        if not sequence.may_end
        for id_ in sequence.end_token_ids
        if id_ < logits_BV.shape[1]
    ]
    if forbidden:
        before_BV = logits_BV.clone()
        logits_BV[_indices(forbidden, logits_BV)] = float("-inf")
        is_empty_B = logits_BV.isneginf().all(-1)
        torch.where(is_empty_B[:, None], before_BV, logits_BV, out=logits_BV)


def _add_bias(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> None:
    biases = [
        (row, id_, bias)
        for row, sequence in enumerate(sequences)
        for id_, bias in sequence.sampling.logit_bias
    ]
    if biases:
        indices = _indices([(row, id_) for row, id_, _ in biases], logits_BV)
        logits_BV[indices] += _numbers([bias for *_, bias in biases], logits_BV)


def _penalise(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> None:
    seen = list(_list_seen(sequences, logits_BV.shape[1]))
    if not seen:
        return
    indices = _indices([(row, id_) for row, id_, _ in seen], logits_BV)
    counts_N = _numbers([count for *_, count in seen], logits_BV)

    def repeat(per_row: list[float]) -> torch.Tensor:
        return _numbers(per_row, logits_BV)[indices[0]]

    asked = [sequence.sampling for sequence in sequences]
    repetition_N = repeat([sampling.repetition_penalty for sampling in asked])
    frequency_N = repeat([sampling.frequency_penalty for sampling in asked])
    presence_N = repeat([sampling.presence_penalty for sampling in asked])
    values_N = logits_BV[indices]
    values_N = torch.where(values_N > 0, values_N / repetition_N, values_N * repetition_N)
    logits_BV[indices] = values_N - frequency_N * counts_N - presence_N * (counts_N > 0)


def _list_seen(sequences: Many[Sequence], vocabulary: int) -> Iterator[tuple[int, int, int]]:
    """Yield (row, token id, count in the response so far) of each token that penalties affect."""
    for row, sequence in enumerate(sequences):
        for id_, count in sequence.seen.items():
            if id_ < vocabulary:  # the image token's id may lie beyond it
                yield row, id_, count


def _indices(pairs: list[tuple[int, int]], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return send(pairs, like.device).unbind(1)


def _numbers(numbers: list[float], like: torch.Tensor) -> torch.Tensor:
    return send(numbers, like.device, torch.float32)
