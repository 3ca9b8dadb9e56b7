"""The recipe of the embedded model, in LLaVA's order, from nothing to a folder of weights.

1. The tower by itself: what is in every patch of painted scenes (the part that CLIP plays).
2. At the same time the language model by itself: conversations about pictures spelled in symbols
   (the part that Vicuna plays; a language model that can look things up).
3. The projector: tower and language model at rest.
4. All together, the tower slowly.
"""

import multiprocessing
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from llava_ray.demo import folder, joined, language, partners, reader, tower

BUDGET_MINUTES = 75.0
SHARES = {"tower": 0.25, "reader": 0.56, "align": 0.04, "joint": 0.40}  # tower beside reader


def train(
    output_dir: Path | str,
    *,
    budget_minutes: float = BUDGET_MINUTES,
    seed: int = 0,
    threads: int = 2,
    work_dir: Path | str | None = None,
) -> Path:
    """Train the model from nothing on the CPU and write it to `output_dir`.

    Stages stop by the CPU time they had, about `budget_minutes` in all on two free cores. Their
    checkpoints go to `work_dir`; a stage whose checkpoint is there is trained on from it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(work_dir or scratch)
        work.mkdir(parents=True, exist_ok=True)
        minutes = {stage: share * budget_minutes for stage, share in SHARES.items()}
        tokenizer = language.train_tokenizer(seed)
        _train_parts(work, tokenizer, minutes, seed)
        model = _join(work, tokenizer, minutes, seed, threads)
        folder.write_folder(Path(output_dir), model.to_llava(tokenizer), tokenizer)
    return Path(output_dir)


def _train_parts(
    work: Path, tokenizer: PreTrainedTokenizerFast, minutes: dict[str, float], seed: int
) -> None:
    """Stages one and two, a process and a core each."""
    context = multiprocessing.get_context("spawn")
    parts = [
        context.Process(
            target=tower.train_tower,
            args=(work / "tower.pt",),
            kwargs={"minutes": minutes["tower"], "seed": seed},
        ),
        context.Process(
            target=reader.train_reader,
            args=(work / "reader.pt", tokenizer),
            kwargs={"minutes": minutes["reader"], "seed": seed},
        ),
    ]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert not any(part.exitcode for part in parts), "a stage failed; its traceback is above"


def _join(
    work: Path,
    tokenizer: PreTrainedTokenizerFast,
    minutes: dict[str, float],
    seed: int,
    cores: int,
) -> joined.Joined:
    """Stages three and four."""
    checkpoint = work / "joined.pt"
    if not checkpoint.exists():
        joined.align_projector(
            checkpoint,
            tokenizer,
            tower=work / "tower.pt",
            reader=work / "reader.pt",
            minutes=minutes["align"],
            seed=seed,
            threads=cores,
        )
    partners.run_together(
        joined.train_joined,
        checkpoint,
        tokenizer,
        partners=cores,
        minutes=minutes["joint"],
        seed=seed,
        threads=1,
    )
    return joined.load_joined(checkpoint, tokenizer)
