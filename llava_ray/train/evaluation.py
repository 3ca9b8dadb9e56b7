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
from llava_ray.train.deepspeed_engine import Trainee
from llava_ray.train.inputs import count_learned, prepare_inputs
from llava_ray.train.train_step import compute_loss

MAX_NEW_TOKENS = 64


class Answer(NamedTuple):
    """What the model says to a sample's first question, beside what stands there."""

    sample_id: str
    prompt: str
    said: str
    right: str


@torch.no_grad()
def evaluate_loss(trainee: Trainee, batches: Iterator[Batch]) -> float:
    """Return the mean loss over the learned tokens of all workers' batches."""
    trainee.engine.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=trainee.device)
    for batch in batches:
        inputs = prepare_inputs(batch, trainee.blank)
        totals[0] += compute_loss(trainee, inputs, num_learned=1).double()
        totals[1] += count_learned(inputs)
    trainee.engine.train()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1].clamp(min=1))


@torch.no_grad()
def answer_samples(trainee: Trainee, samples: Iterator[Batch], num: int) -> list[Answer]:
    """Return greedy answers to the first `num` samples, each a batch of its own.

    All workers answer all of them together, as weights that ZeRO divides need every worker.
    """
    num_workers = dist.get_world_size()
    gathered: list[list[Batch]] = [[] for _ in range(num_workers)]
    dist.all_gather_object(gathered, list(islice(samples, -(-num // num_workers))))
    dealt = [sample for turn in zip_longest(*gathered) for sample in turn if sample]
    trainee.engine.eval()
    answers = [_answer(trainee, sample) for sample in dealt[:num] if _has_answer(sample)]
    trainee.engine.train()
    return answers


def _has_answer(sample: Batch) -> bool:
    return bool((sample.arrays["labels"] != IGNORED).any())


def _answer(trainee: Trainee, sample: Batch) -> Answer:
    inputs = sample.to_tensors()
    labels = inputs.pop("labels")[0].tolist()
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    end = next((i for i in range(start, len(labels)) if labels[i] == IGNORED), len(labels))
    ids = inputs["input_ids"][0].tolist()
    inputs |= {name: inputs[name][:, :start] for name in ("input_ids", "attention_mask")}
    placed = {name: tensor.to(trainee.device) for name, tensor in inputs.items()}
    if "pixel_values" in placed:
        placed["pixel_values"] = placed["pixel_values"].to(trainee.core.model.dtype)
    model = trainee.core.model
    output = model.generate(
        **placed, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, use_cache=True
    )
    return Answer(
        sample.sample_ids[0],
        _decode(trainee, ids[:start]),
        _decode(trainee, output[0, start:].tolist()),
        _decode(trainee, ids[start:end]),
    )


def _decode(trainee: Trainee, ids: Sequence[int]) -> str:
    return trainee.core.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
