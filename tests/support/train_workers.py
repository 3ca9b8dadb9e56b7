"""Training in plain processes, without Ray: a tiny model on made-up samples, held in memory."""

import io
import json
import os
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, count
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_ray.config import LimitsConfig, TrainConfig
from llava_ray.data.loader.collate import Batch, collate
from llava_ray.data.loader.encode import EncodedSample, Encoder, load_encoder
from llava_ray.data.loader.order import MixtureComponent, Position, SampleOrder
from llava_ray.data.shards import ShardRow
from llava_ray.types import IMAGE, Message, Sample, TextPart
from tests.support.tiny_checkpoint import make_image, tiny_model

NUM_SAMPLES = 24
HELD_OUT = range(NUM_SAMPLES, NUM_SAMPLES + 6)
BATCH_SIZE = 4


@dataclass
class Scenario:
    """A run: its settings, the checkpoint that it resumes from, the number of steps after which it
    is interrupted, and the step at which it is told that its machine will be taken away.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None
    num_steps: int = 10
    stop_after: int | None = None
    leaves_at: int | None = None


def make_config(**settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "name": "run",
        "model": str(tiny_model()),
        "data": {"datasets": [{"path": "memory"}]},
        "train_batch_size": BATCH_SIZE,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 10,
        "learning_rate": 2e-3,
        "warmup_ratio": 0.1,
        "weight_decay": 0.1,
        "save_steps": 1000,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return TrainConfig(**(defaults | settings))


@cache
def make_example(model: str, number: int) -> EncodedSample:
    """Return sample `number`; every third has no image, and lengths differ."""
    images = () if number % 3 == 2 else (make_image(number),)
    parts = (*(IMAGE for _ in images), TextPart(f"how many are there in number {number}?"))
    answer = "there are " + "very " * (number % 5) + f"many, {number * 7} at least"
    messages = (Message("user", parts), Message("assistant", (TextPart(answer),)))
    sample = Sample(f"sample-{number}", messages, tuple(_encode_png(image) for image in images))
    row = ShardRow(sample, tuple(image.size for image in images))
    return _load_encoder(model).encode(row, LimitsConfig())


def make_order(seed: int = 42) -> SampleOrder:
    return SampleOrder(
        mixture=(MixtureComponent(NUM_SAMPLES),),
        lengths=np.arange(NUM_SAMPLES) % 5,
        has_images=np.arange(NUM_SAMPLES) % 3 != 2,
        batch_size=BATCH_SIZE,
        seed=seed,
    )


def make_batches(
    config: TrainConfig, rank: int, num_workers: int, start: Position | None
) -> Iterator[Batch]:
    """Yield a worker's batches as `data.stream` does."""
    order = make_order(config.seed)
    position = start or order.start()
    accumulation = config.count_accumulation(num_workers)
    while position.epoch < config.num_train_epochs:
        split = order.split_batch(position, num_workers=num_workers, accumulation=accumulation)[
            rank
        ]
        position = order.advance(position)
        for i, numbers in enumerate(split):
            examples = [make_example(config.model, int(number)) for number in numbers]
            yield Batch(
                collate(examples, pad_token_id=_load_encoder(config.model).pad_token_id),
                tuple(example.sample_id for example in examples),
                is_last=i == len(split) - 1,
                resume_at=position,
            )


def make_eval_batches(
    config: TrainConfig, rank: int, num_workers: int, size: int
) -> Iterator[Batch]:
    """Yield a worker's batches of the held-out samples, the last of them with fewer or none."""
    for start in range(0, len(HELD_OUT), size * num_workers):
        numbers = HELD_OUT[start : start + size * num_workers][rank * size : (rank + 1) * size]
        examples = [make_example(config.model, number) for number in numbers]
        arrays = collate(examples, pad_token_id=_load_encoder(config.model).pad_token_id)
        yield Batch(arrays, tuple(example.sample_id for example in examples))


def run_gang(num_workers: int, scenarios: Sequence[Scenario], folder: Path) -> None:
    """Run scenarios one after another in the same processes; each has `folder/<name>`.

    There lie afterwards train_log.jsonl and the checkpoints, or error.txt.
    """
    run_gangs({num_workers: scenarios}, folder)


def run_gangs(gangs: Mapping[int, Sequence[Scenario]], folder: Path) -> None:
    """Run a gang of each number of workers, all at the same time; see `run_gang`.

    Processes are forked from one that has imported all that is slow to import.
    """
    import torch.multiprocessing as multiprocessing

    model = str(tiny_model())  # written here: beside others transformers writes on the first alone
    for scenario in chain.from_iterable(gangs.values()):
        scenario.settings = {"model": model, **scenario.settings}
    set_forkserver_preload(["llava_ray.train.loop"])
    running = [
        multiprocessing.start_processes(
            _work,
            (num_workers, list(scenarios), folder),
            nprocs=num_workers,
            join=False,
            start_method="forkserver",
        )
        for num_workers, scenarios in gangs.items()
    ]
    for gang in running:
        while gang and not gang.join():
            pass


def read_lines(folder: Path, name: str, having: str) -> list[dict[str, Any]]:
    """Return the lines of a scenario's log that contain a key."""
    if (folder / name / "error.txt").exists():
        raise AssertionError((folder / name / "error.txt").read_text())
    lines = (folder / name / "train_log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if having in line]


def read_losses(folder: Path, name: str) -> list[float]:
    return [line["loss"] for line in read_lines(folder, name, "loss")]


def _work(rank: int, num_workers: int, scenarios: list[Scenario], folder: Path) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_workers),
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meeting = folder / f"meeting-{num_workers}-{scenarios[0].name}"
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_workers
    )
    try:
        for scenario in scenarios:
            try:
                _train(scenario, rank, num_workers, folder)
            except Exception:  # noqa: BLE001
                (folder / scenario.name).mkdir(exist_ok=True)
                (folder / scenario.name / "error.txt").write_text(traceback.format_exc())
    finally:
        dist.destroy_process_group()


class _Stop(Exception):  # noqa: N818
    """Interrupts a run, as the failure of a machine does."""


def _train(scenario: Scenario, rank: int, num_workers: int, folder: Path) -> None:
    import torch.distributed as dist

    from llava_ray.train.log import RunLog
    from llava_ray.train.loop import LoopContext, train

    config = make_config(**scenario.settings)
    home = folder / scenario.name
    home.mkdir(exist_ok=True)

    def keep(checkpoint: Path, metrics: dict[str, float]) -> None:
        dist.barrier()
        if rank == 0:
            checkpoint.rename(home / f"checkpoint-{int(metrics['step'])}")
        dist.barrier()

    def read(start: Position | None) -> Iterator[Batch]:
        batches = make_batches(config, rank, num_workers, start)
        stop_after = scenario.stop_after
        accumulation = config.count_accumulation(num_workers)
        for i, batch in enumerate(batches):
            if stop_after is not None and i == stop_after * accumulation:
                raise _Stop
            yield batch

    def read_held_out(size: int) -> Iterator[Batch]:
        return make_eval_batches(config, rank, num_workers, size)

    steps = count(1)
    context = LoopContext(
        read_batches=read,
        read_eval_batches=read_held_out if config.eval_datasets else None,
        num_steps=scenario.num_steps,
        new_folder=lambda: home / "new",
        keep=keep,
        is_leaving=lambda: next(steps) == scenario.leaves_at,
    )
    resume = folder / scenario.resume if scenario.resume else None
    try:
        train(
            config, context, RunLog(home if rank == 0 else None, say=lambda _: None), resume=resume
        )
    except _Stop:
        dist.barrier()


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@cache
def _load_encoder(model: str) -> Encoder:
    return load_encoder(model)


if __name__ == "__main__":
    run_gang(1, [Scenario("run")], Path(tempfile.mkdtemp()))
