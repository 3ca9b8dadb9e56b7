"""One training step: the loss of a global batch, its gradients, and the update of the weights.

The loss is the mean over all learned tokens of the global batch, wherever they are computed, so it
is the same on any number of workers and with any accumulation.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from llava_ray.data.loader.collate import Batch
from llava_ray.errors import DivergedError, TrainingError
from llava_ray.train.deepspeed_engine import TrainState
from llava_ray.train.inputs import count_learned, prepare_inputs


class StepMetrics(NamedTuple):
    """What a step was, over all workers.

    Attributes:
        loss: mean over the learned tokens; None if there are none, as when no sample can be used.
        grad_norm: before clipping; None where DeepSpeed does not say.
        num_learned, num_tokens, num_padding: tokens that were learned, read, and mere padding.
        num_samples: of the global batch.
        sample_ids: of all of them, worker after worker.
        dropped: ids that were left out, with the reason.
    """

    loss: float | None
    grad_norm: float | None
    num_learned: int
    num_tokens: int
    num_padding: int
    num_samples: int
    sample_ids: tuple[str, ...]
    dropped: dict[str, str]


def group_steps(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """Yield a worker's batches, those of a step together."""
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        if batch.is_last:
            yield held
            held = []


def take_step(
    state: TrainState, batches: Sequence[Batch], *, step: int, rate: float, seed: int
) -> StepMetrics:
    """Train on this worker's share of a global batch; all workers must call this together.

    Args:
        state: its weights are updated.
        batches: `accumulation` of them.
        step: its number, from 1; for messages.
        rate: share of the highest learning rates.
        seed: of dropout.

    Raises:
        DivergedError: The loss is NaN or infinite.
        TrainingError: The device ran out of memory.
    """
    engine = state.engine
    inputs = [prepare_inputs(batch, state.blank) for batch in batches]
    masks = [each["attention_mask"] for each in inputs]
    learned, places = sum(map(count_learned, inputs)), sum(mask.numel() for mask in masks)
    counts = [learned, sum(int(mask.sum()) for mask in masks), places]
    num_learned, num_tokens, num_places = map(int, _sum(state, counts))
    torch.manual_seed(seed + dist.get_rank())
    for group in engine.optimizer.param_groups:
        group["lr"] = group["max_lr"] * rate
    on_device: list[torch.Tensor] = []
    try:
        for each in inputs:
            loss = compute_loss(state, each, num_learned=num_learned)
            on_device.append(loss.detach())
            engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            engine.step()
    except torch.OutOfMemoryError as error:
        raise TrainingError(explain_memory(inputs)) from error
    losses = torch.stack(on_device).tolist()  # not before, or a GPU waits at each
    (total,) = _sum(state, [sum(losses)])
    gathered = _gather(batches)
    if total != total or abs(total) == float("inf"):
        raise DivergedError(_explain_loss(step, total, losses, batches))
    norm = engine.get_global_grad_norm()
    return StepMetrics(
        loss=total if num_learned else None,
        grad_norm=None if norm is None else float(norm),
        num_learned=num_learned,
        num_tokens=num_tokens,
        num_padding=num_places - num_tokens,
        num_samples=len(gathered[0]),
        sample_ids=gathered[0],
        dropped=gathered[1],
    )


def compute_loss(
    state: TrainState, inputs: Mapping[str, torch.Tensor], *, num_learned: int
) -> torch.Tensor:
    """Return a batch's part in the mean loss over `num_learned` tokens."""
    placed = {name: tensor.to(state.device) for name, tensor in inputs.items()}
    placed["pixel_values"] = placed["pixel_values"].to(state.core.model.dtype)
    return state.engine(**placed, num_items_in_batch=max(1, num_learned)).loss


def explain_memory(inputs: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Return what to do where a batch did not fit."""
    shapes = [tuple(each["input_ids"].shape) for each in inputs]
    return (
        f"out of memory on worker {dist.get_rank()} with batches of {shapes} (samples, tokens): "
        "lower per_device_train_batch_size (train_batch_size is kept by accumulating more) or "
        "data.max_length, set gradient_checkpointing=true, zero_stage=3 or offload, or use "
        "method=lora"
    )


def _explain_loss(
    step: int, total: float, losses: Sequence[float], batches: Sequence[Batch]
) -> str:
    bad = [loss != loss or abs(loss) == float("inf") for loss in losses]
    found = [b.sample_ids for b, is_bad in zip(batches, bad, strict=True) if is_bad]
    gathered: list[list[tuple[str, ...]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, found)
    ids = sorted({id_ for some in gathered for batch in some for id_ in batch})
    return (
        f"the loss of step {step} is {total} in a batch with the samples {ids}: lower "
        "learning_rate, set max_grad_norm, or inspect these samples"
    )


def _sum(state: TrainState, values: Sequence[float]) -> list[float]:
    """Return the sum of each number over all workers."""
    totals = torch.tensor(values, dtype=torch.float64, device=state.device)
    dist.all_reduce(totals)
    return totals.tolist()


def _gather(batches: Sequence[Batch]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the ids of a step over all workers, and those that were left out."""
    mine = [
        (batch.sample_ids, [(d.sample_id, d.reason) for d in batch.dropped]) for batch in batches
    ]
    gathered: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    ids = tuple(id_ for some in gathered for batch, _ in some for id_ in batch)
    return ids, {id_: reason for some in gathered for _, left in some for id_, reason in left}
