"""The benchmark of training, run by `python jobs/benchmark.py train`.

It trains the same model with the same batches, optimizer and precision in a bare PyTorch loop, in
this project's loop without ZeRO and with ZeRO 2, and in transformers' Trainer with ZeRO 2. Each
runs in its own process, and they take turns step by step, so that a ratio compares steps that ran
at nearly the same time. Then this project runs on Ray, with batches from shards. A step's time is
measured from its beginning to that of the next, so it includes all work between steps.
"""

import dataclasses
import io
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_run import Clock, alone, print_table, take_turns
from PIL import Image

NUM_WARM = 5
"""Number of steps at the beginning of each run that are not counted."""
SEED = 7
BARE = "bare PyTorch loop"
TRAINER = "transformers Trainer, ZeRO 2"
ON_RAY = "llava_ray on Ray, ZeRO 2"


@dataclass(frozen=True)
class Work:
    """The work of every system.

    Attributes:
        model: folder of the model.
        shards: folder of the samples.
        scratch: folder for the outputs of a run.
        batch_size: samples per step.
        num_steps: steps of a run, including those for warm-up.
        num_threads: torch's threads.
    """

    model: str
    shards: str
    scratch: str
    batch_size: int
    num_steps: int
    num_threads: int


@dataclass(frozen=True)
class StepTimeSummary:
    """One row of the table.

    Attributes:
        system: the system's name.
        steps: number of timed steps.
        step_p50_ms, step_p95_ms: percentiles of a step's time.
        to_bare_loop, to_trainer: median ratio to that system's step of the same turn, with its
            95 % confidence interval.
    """

    system: str
    steps: int
    step_p50_ms: float
    step_p95_ms: float
    to_bare_loop: str
    to_trainer: str


def benchmark_train(
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Samples of a step.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(help="Times that each system runs, in turns.")] = 2,
) -> None:
    """Compare step times of a bare loop, this project, Trainer with DeepSpeed, and Ray."""
    os.environ.update(RAY_AUTH_MODE="disabled", DS_ACCELERATOR="cpu")
    from llava_ray.model.build.random_model import TINY, build_random_model

    shape = dataclasses.replace(
        TINY,
        hidden_size=256,
        num_layers=4,
        mlp_size=1024,
        vision_hidden_size=128,
        vision_num_layers=4,
        image_size=112,
        patch_size=14,
        spread=0.02,
    )
    systems: dict[str, Callable[[Work, Clock], None]] = {
        BARE: run_bare_loop,
        "llava_ray, no ZeRO": run_without_zero,
        "llava_ray, ZeRO 2": run_zero2,
        TRAINER: run_trainer,
    }
    times_s: dict[str, list[float]] = {name: [] for name in (*systems, ON_RAY)}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = build_random_model(place / "model", shape)
        shards = place / "shards"
        alone(write_shards, place, shards, steps * batch_size)
        work = Work(str(model), str(shards), scratch, batch_size, steps, threads)
        for number in range(rounds):
            in_round = dataclasses.replace(work, scratch=f"{scratch}/{number}")
            found = dict(zip(systems, take_turns(list(systems.values()), in_round), strict=True))
            found[ON_RAY] = alone(run_on_ray, in_round)
            for name, round_s in found.items():
                times_s[name] += round_s[NUM_WARM:]
                print(f"{name}: {1e3 * statistics.median(round_s[NUM_WARM:]):.1f} ms", flush=True)
    print_table([describe(name, times_s) for name in times_s])


def describe(name: str, times_s: Mapping[str, Sequence[float]]) -> StepTimeSummary:
    found_s = times_s[name]
    return StepTimeSummary(
        name,
        len(found_s),
        round(1e3 * statistics.median(found_s), 1),
        round(1e3 * statistics.quantiles(found_s, n=20)[-1], 1),
        compare(found_s, times_s[BARE]),
        compare(found_s, times_s[TRAINER]),
    )


def compare(found_s: Sequence[float], other_s: Sequence[float]) -> str:
    """Return the median ratio of two systems' steps, and its confidence interval."""
    ratios = sorted(found / other for found, other in zip(found_s, other_s, strict=True))
    last = len(ratios) - 1
    away = 0.98 * len(ratios) ** 0.5  # 1.96 standard deviations of the median's rank
    low, high = ratios[max(0, round(last / 2 - away))], ratios[min(last, round(last / 2 + away))]
    return f"{statistics.median(ratios):.3f} ({low:.2f} to {high:.2f})"


def write_shards(folder: Path, target: Path, num_samples: int) -> None:
    """Write samples with an image, a question and an answer, all of equal length."""
    import ray

    from llava_ray.config import ConvertConfig
    from llava_ray.data.convert.run import convert_dataset

    rows = []
    for number in range(num_samples):
        image = Image.new("RGB", (112, 112), (number % 256, 90, 160))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        (folder / f"{number}.png").write_bytes(buffer.getvalue())
        asked = {"from": "human", "value": "<image>\nWhich number is it, and why so?"}
        said = {"from": "gpt", "value": f"It is number {number:06}, as it always was."}
        turns = [asked, said]
        rows.append({"id": f"{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    convert_dataset(
        ConvertConfig(
            source="llava",
            input=str(folder / "rows.json"),
            output=str(target),
            images=str(folder),
        )
    )
    ray.shutdown()


def make_config(work: Work, **settings: Any) -> Any:
    from llava_ray.config import TrainConfig

    fields: dict[str, Any] = {
        "name": "run",
        "model": work.model,
        "data": {"datasets": [{"path": work.shards}], "num_readers": 1, "reader_cpus": 0},
        "output_dir": work.scratch,
        "train_batch_size": work.batch_size,
        "per_device_train_batch_size": work.batch_size,
        "learning_rate": 1e-4,
        "save_steps": 10**6,
        "bf16": False,
        "gradient_checkpointing": False,
        "cpus_per_worker": work.num_threads,
        "max_steps": work.num_steps,
        "seed": SEED,
    }
    return TrainConfig(**(fields | settings))


def read_batches(work: Work) -> list[Any]:
    """Return all batches of a run, read into memory."""
    from llava_ray.data.loader.stream import EncoderSpec, stream_batches

    config = make_config(work).data.model_copy(update={"num_readers": 0})
    return list(stream_batches(config, EncoderSpec(work.model)))


def begin(work: Work) -> None:
    """Initialise this process as a training run with one worker."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(work.num_threads)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    meeting = f"{tempfile.mkdtemp()}/meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)


def run_bare_loop(work: Work, clock: Clock) -> None:
    """Run a loop of plain PyTorch, with the same gradient clipping."""
    import torch

    from llava_ray.model import load_model

    batches = read_batches(work)
    torch.set_num_threads(work.num_threads)
    model: Any = load_model(work.model, dtype="float32", device="cpu").model.train()
    model.model.vision_tower.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    for batch in batches:
        clock.tick()
        loss = model(**batch.to_tensors(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # as the other systems do to log it


def run_without_zero(work: Work, clock: Clock) -> None:
    run_loop(work, clock, zero_stage=0)


def run_zero2(work: Work, clock: Clock) -> None:
    run_loop(work, clock, zero_stage=2)


def run_loop(work: Work, clock: Clock, **settings: Any) -> None:
    """Run this project's loop, without Ray."""
    from llava_ray.train.log import RunLog
    from llava_ray.train.loop import LoopContext, train

    batches = read_batches(work)
    begin(work)

    def read(start: Any) -> Iterator[Any]:
        for batch in batches:
            clock.tick()
            yield batch

    context = LoopContext(
        read_batches=read,
        read_eval_batches=None,
        num_steps=work.num_steps,
        new_folder=lambda: Path(tempfile.mkdtemp(dir=work.scratch)),
        keep=lambda folder, metrics: None,
    )
    Path(work.scratch).mkdir(exist_ok=True)
    log = RunLog(Path(tempfile.mkdtemp(dir=work.scratch)), say=lambda _: None)
    train(make_config(work, **settings), context, log)


def run_trainer(work: Work, clock: Clock) -> None:
    """Run transformers' Trainer with DeepSpeed."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llava_ray.model import load_model
    from llava_ray.train.deepspeed_config import describe_engine
    from llava_ray.train.deepspeed_engine import import_deepspeed

    batches = read_batches(work)
    begin(work)
    import_deepspeed(is_gpu=False)
    described = describe_engine(make_config(work), num_workers=1, hidden_size=256, is_bf16=False)
    arguments = TrainingArguments(
        output_dir=work.scratch,
        deepspeed=described,
        use_cpu=True,
        per_device_train_batch_size=work.batch_size,
        max_steps=work.num_steps,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    torch.set_num_threads(work.num_threads)
    model: Any = load_model(work.model, dtype="float32", device="cpu").model.train()
    model.model.vision_tower.requires_grad_(False)
    model.config.use_cache = model.config.text_config.use_cache = False

    class Ticking(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    # Each row is a whole prepared batch, as in the other systems.
    rows = [batch for batch in batches for _ in range(work.batch_size)]
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=lambda held: held[0].to_tensors(),
        callbacks=[Ticking()],
    ).train()


def run_on_ray(work: Work) -> list[float]:
    """Return the step times of a run on Ray Train, which reads its batches from shards."""
    import ray

    from llava_ray.train.launch import launch
    from llava_ray.train.log import read_log

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    folder = launch(make_config(work))
    ray.shutdown()
    lines = [line for line in read_log(Path(folder)) if "loss" in line]
    waited_ms = 1e3 * statistics.median(line["wait_s"] for line in lines[NUM_WARM:])
    print(f"on Ray a step waits {waited_ms:.1f} ms for its batch and the log", flush=True)
    return [line["wait_s"] + line["step_s"] for line in lines[:-1]]
