"""What is measured while training: the loss on held-out data, and a few answers to look at.

All workers call these together.

Shapes: T tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist

from llava_ray.data.loader.collate import Batch
from llava_ray.template import IGNORED
from llava_ray.train.deepspeed_engine import TrainState
from llava_ray.train.inputs import count_learned, prepare_inputs
from llava_ray.train.train_step import compute_loss

MAX_NEW_TOKENS = 64


class GeneratedAnswer(NamedTuple):
    """What the model says to a sample's first question, beside what stands there."""

    sample_id: str
    prompt: str
    said: str
    right: str


@torch.no_grad()
def evaluate_loss(state: TrainState, batches: Iterator[Batch]) -> float:
    """Return the mean loss over the learned tokens of all batches; NaN if there are none."""
    state.engine.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=state.device)
    for batch in batches:
        inputs = prepare_inputs(batch, state.blank)
        totals[0] += compute_loss(state, inputs, num_learned=1).double()
        totals[1] += count_learned(inputs)
    state.engine.train()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])


@torch.no_grad()
def answer_samples(state: TrainState, samples: Iterator[Batch], num: int) -> list[GeneratedAnswer]:
    """Return greedy answers to the first `num` samples, each a batch of its own.

    All workers answer all of them together, as weights that ZeRO divides need every worker.
    """
    num_workers = dist.get_world_size()
    gathered: list[list[Batch]] = [[] for _ in range(num_workers)]
    dist.all_gather_object(gathered, list(islice(samples, -(-num // num_workers))))
    interleaved = [sample for turn in zip_longest(*gathered) for sample in turn if sample]
    state.engine.eval()
    answers = [_answer(state, sample) for sample in interleaved[:num] if _has_answer(sample)]
    state.engine.train()
    return answers


def _has_answer(sample: Batch) -> bool:
    return bool((sample.arrays["labels"] != IGNORED).any())


def _answer(state: TrainState, sample: Batch) -> GeneratedAnswer:
    inputs = sample.to_tensors()
    labels = inputs.pop("labels")[0].tolist()
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    end = next((i for i in range(start, len(labels)) if labels[i] == IGNORED), len(labels))
    ids = inputs["input_ids"][0].tolist()
    inputs |= {name: inputs[name][:, :start] for name in ("input_ids", "attention_mask")}
    placed = {name: tensor.to(state.device) for name, tensor in inputs.items()}
    if "pixel_values" in placed:
        placed["pixel_values"] = placed["pixel_values"].to(state.core.model.dtype)
    model = state.core.model
    output = model.generate(
        **placed,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        # Under ZeRO 3 every token gathers weights from all workers: one whose answer ended earlier,
        # by a rounding, would leave the others waiting.
        synced_gpus=state.stage == 3,
    )
    return GeneratedAnswer(
        sample.sample_ids[0],
        _decode(state, ids[:start]),
        _decode(state, output[0, start:].tolist()),
        _decode(state, ids[start:end]),
    )


def _decode(state: TrainState, ids: Sequence[int]) -> str:
    return state.core.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
