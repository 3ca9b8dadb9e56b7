"""The training loop of one worker: steps, evaluation, log, checkpoints. It does not import Ray.

read_batches(position) -> group_steps -> take_step -> log -> save_checkpoint -> keep
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from llava_ray.config import TrainConfig
from llava_ray.data.loader.collate import Batch
from llava_ray.data.loader.order import Position
from llava_ray.errors import ConfigError, StoppedError
from llava_ray.train.best import UNKNOWN
from llava_ray.train.checkpoint import (
    TrainProgress,
    is_same_partition,
    open_state,
    read_progress,
    restore_state,
    save_checkpoint,
)
from llava_ray.train.deepspeed_config import describe_engine, read_stage
from llava_ray.train.deepspeed_engine import TrainState, build_train_state
from llava_ray.train.evaluation import answer_samples, evaluate_loss
from llava_ray.train.flops import compute_mfu, count_flops, find_peak_flops
from llava_ray.train.log import RunLog, StepLine, StepTimes
from llava_ray.train.schedule import compute_lr_scale
from llava_ray.train.train_step import StepMetrics, group_steps, take_step

ReadBatches = Callable[[Position | None], Iterator[Batch]]
"""Returns this worker's batches from a position in the data on."""


@dataclass(frozen=True)
class LoopContext:
    """What the loop needs from its caller.

    Attributes:
        read_batches: Returns the training batches.
        read_eval_batches: Returns the held-out data from its start, in batches of the given size
            per worker; None if there is no held-out data.
        num_steps: Number of steps of the whole run.
        new_folder: Returns an empty folder for a checkpoint.
        keep: Stores a checkpoint's folder with its metrics; all workers call it together.
        is_leaving: Whether to save at once because this machine will be preempted; all workers
            call it together.
        is_stopping: Whether this worker was told that the run shall save and end.
    """

    read_batches: ReadBatches
    read_eval_batches: Callable[[int], Iterator[Batch]] | None
    num_steps: int
    new_folder: Callable[[], Path]
    keep: Callable[[Path, dict[str, float]], None]
    is_leaving: Callable[[], bool] = lambda: False
    is_stopping: Callable[[], bool] = lambda: False


def train(
    config: TrainConfig, context: LoopContext, log: RunLog, *, resume: Path | None = None
) -> None:
    """Train to the end of the run, from its start or from a checkpoint.

    Args:
        config: Settings of the run.
        context: Data and storage of this worker.
        log: Log of the run.
        resume: Folder of the checkpoint to resume from.

    Raises:
        ConfigError: The run cannot start, or the checkpoint belongs to another run.
        TrainingError: The run cannot continue.
        StoppedError: It was told to stop, and has saved a checkpoint.
    """
    state, progress = begin(config, resume)
    log.begin(
        state.param_groups, num_steps=context.num_steps, step=progress.step if progress else 0
    )
    step = progress.step if progress else 0
    batches = context.read_batches(progress.position if progress else None)
    peak, num_workers = find_peak_flops(config, state.device), dist.get_world_size()
    flops_a_token = count_flops(state.param_groups)
    has_left = False
    waiting_since_s = time.perf_counter()
    for held in group_steps(batches):
        if step >= context.num_steps:
            break
        started_s = time.perf_counter()
        rate = compute_lr_scale(config, step, context.num_steps)
        seed = _mix_seed(config.seed, step)
        step += 1
        figures = take_step(state, held, step=step, rate=rate, seed=seed)
        times = StepTimes(started_s - waiting_since_s, time.perf_counter() - started_s)
        mfu = compute_mfu(figures.num_tokens * flops_a_token, sum(times), peak, num_workers)
        log.write(StepLine.make(step, figures, times, rate=config.learning_rate * rate, mfu=mfu))
        waiting_since_s = time.perf_counter()
        is_leaving = not has_left and context.is_leaving()
        has_left = has_left or is_leaving
        is_stopping = _is_any(state, context.is_stopping())
        if is_leaving or is_stopping or step % config.save_steps == 0 or step == context.num_steps:
            save(state, config, context, log, step, held[-1].resume_at, figures)
            if is_stopping and step < context.num_steps:
                raise StoppedError(f"stopped after step {step} of {context.num_steps}")
            waiting_since_s = time.perf_counter()
        elif config.eval_steps and step % config.eval_steps == 0:
            evaluate(state, config, context, log, step)
            waiting_since_s = time.perf_counter()


def begin(config: TrainConfig, resume: Path | None) -> tuple[TrainState, TrainProgress | None]:
    """Build the state, restored from a checkpoint if one is given.

    Raises:
        ConfigError: As in `train`.
    """
    if resume is None:
        return build_train_state(config), None
    progress = read_progress(resume)
    if progress.method != config.method:
        raise ConfigError(
            f"the checkpoint was trained with method={progress.method!r}, but the run has "
            f"{config.method!r}: set method={progress.method}, or give the run another name"
        )
    described = describe_engine(
        config, num_workers=dist.get_world_size(), hidden_size=1, is_bf16=False
    )
    is_alike = is_same_partition(progress, read_stage(described))
    with open_state(resume, is_alike=is_alike) as state_folder:
        state = build_train_state(config, universal=not is_alike)
        restore_state(state_folder, state)
    return state, progress


def save(
    state: TrainState,
    config: TrainConfig,
    context: LoopContext,
    log: RunLog,
    step: int,
    position: Position,
    figures: StepMetrics,
) -> None:
    """Evaluate, write a checkpoint and store it."""
    metrics = {"step": float(step), "loss": UNKNOWN if figures.loss is None else figures.loss}
    if context.read_eval_batches:
        metrics["eval_loss"] = evaluate(state, config, context, log, step)
    folder = context.new_folder()
    save_checkpoint(folder, state, config, step=step, position=position, loss=figures.loss)
    log.flush()
    context.keep(folder, metrics)


def evaluate(
    state: TrainState, config: TrainConfig, context: LoopContext, log: RunLog, step: int
) -> float:
    """Evaluate on the held-out data, log the result, and return the loss."""
    assert context.read_eval_batches is not None
    loss = evaluate_loss(state, context.read_eval_batches(config.per_device_train_batch_size))
    log.write_evaluation(step, loss)
    if num := config.num_generations:
        log.write_answers(step, answer_samples(state, context.read_eval_batches(1), num))
    return loss


def _is_any(state: TrainState, flag: bool) -> bool:
    """Return whether the flag is set on any worker."""
    flags = torch.tensor([float(flag)], device=state.device)
    dist.all_reduce(flags)
    return bool(flags.item())


def _mix_seed(seed: int, step: int) -> int:
    """Return the seed of a step, far from those of neighbouring steps."""
    return (seed * 1_000_003 + step * 7919) % 2**31
