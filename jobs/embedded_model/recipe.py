"""The recipe of the embedded model: four stages, from random weights to a model folder.

1. The vision tower by itself, in place of CLIP's training: what is in every patch of drawn scenes.
2. The language model by itself, in place of Vicuna's training: conversations about images that are
   given as symbols.
3. The projector, with tower and language model frozen.
4. Projector and language model together, on drawn images.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from jobs.embedded_model import folder, joined, language, partners, reader, tower
from jobs.embedded_model.pace import Pace, resume, save
from llava_ray.demo import MODEL_DIR
from llava_ray.errors import ConfigError

MINUTES = {"tower": 16.0, "reader": 41.0, "align": 3.0, "joint": 81.0}
"""Default duration of each stage: minutes of CPU time on each of two cores."""

BUDGET_MINUTES = sum(MINUTES.values())
STAGES = tuple(MINUTES)


def train(
    output_dir: Path | str,
    *,
    budget_minutes: float = BUDGET_MINUTES,
    seed: int = 0,
    threads: int = 2,
    work_dir: Path | str | None = None,
    start: Path | None = None,
) -> Path:
    """Train the model on the CPU and write it to `output_dir`.

    Each stage stops after its share of CPU time; all four take `budget_minutes` if `threads` cores
    are free. Their checkpoints are written to `work_dir`; existing ones are continued.

    Args:
        start: folder of a model that this function wrote: its tower is trained further, then
            projector and language model together. By default all stages run.
    """
    stages = ("tower", "joint") if start else STAGES
    share = budget_minutes / sum(MINUTES[stage] for stage in stages)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(work_dir or scratch)
        work.mkdir(parents=True, exist_ok=True)
        if start:
            unpack(start, work)
        tokenizer = load_tokenizer(work / "tokenizer")

        def run(stage: str, function: Callable[..., None], *args: Any, **options: Any) -> None:
            if stage in stages:
                pace = Pace(MINUTES[stage] * share, seed)
                path = work / f"{stage}.pt"
                partners.run_together(function, path, pace, *args, partners=threads, **options)

        run("tower", tower.train_tower)
        if start:
            take_tower(work)
        run("reader", reader.train_reader, tokenizer)
        neighbours = {"tower": work / "tower.pt", "reader": work / "reader.pt"}
        run("align", joined.align_projector, tokenizer, **neighbours)
        if not (work / "joint.pt").exists():
            shutil.copyfile(work / "align.pt", work / "joint.pt")
        run("joint", joined.train_joined, tokenizer)
        write_model(work / "joint.pt", Path(output_dir), tokenizer)
    return Path(output_dir)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of earlier stages, or train one and save it for later stages."""
    if not path.exists():
        language.train_tokenizer().save_pretrained(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def unpack(model_dir: Path, work_dir: Path) -> None:
    """Write a finished model's parts as the checkpoints from which the last stage continues.

    Raises:
        ConfigError: it is not a model that `train` has written.
    """
    # The shipped model's heads are in the repository only: serving does not need them.
    parent = Path(__file__).parent if model_dir == MODEL_DIR else model_dir
    if not (parent / folder.TEACHERS).is_file():
        raise ConfigError(
            f"{str(model_dir)!r} has no {folder.TEACHERS}: give the folder of a model that "
            "`python -m jobs.embedded_model train` wrote, or train from scratch"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.chat_template = language.CHAT_TEMPLATE
    tokenizer.model_max_length = language.CONTEXT
    tokenizer.save_pretrained(work_dir / "tokenizer")
    model = joined.Joined(tokenizer)
    llava = LlavaForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    model.take_over(llava, torch.load(parent / folder.TEACHERS))
    save(model, work_dir / "joint.pt")
    save(model.labeller, work_dir / "tower.pt")


def take_tower(work_dir: Path) -> None:
    """Put the tower that was trained on into what the last stage goes on with."""
    model = joined.Joined(load_tokenizer(work_dir / "tokenizer"))
    resume(model, work_dir / "joint.pt")
    resume(model.labeller, work_dir / "tower.pt")
    save(model, work_dir / "joint.pt")


def write_model(checkpoint: Path, output_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model folder of a checkpoint of the last stage."""
    model = joined.Joined(tokenizer)
    resume(model, checkpoint)
    folder.write_folder(output_dir, model.to_llava(tokenizer), tokenizer, model.teachers())
