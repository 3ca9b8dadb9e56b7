"""The files of a run, on disk or in object storage: settings, log, checkpoints, export, curves.

config.yaml         all settings of the run
train_log.jsonl     one line per step, with the samples' ids
checkpoint-<step>/  see `checkpoint`
export/             the model as `serve` and `evaluate` take it, and llava_ray_run.json
curves.png          loss, learning rate, throughput
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import llava_ray
from llava_ray.config import TrainConfig
from llava_ray.data.loader.dataset import open_datasets
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.export.atomic_folder import write_json
from llava_ray.model.export.export import export_model
from llava_ray.storage import is_address, open_folder
from llava_ray.train.checkpoint import MODEL, read_progress
from llava_ray.train.log import LOG, read_log

EXPORT = "export"
RUN_FILE = "llava_ray_run.json"
FILES = ("config.yaml", "train_log.jsonl")
"""What resuming a run needs besides a checkpoint."""


@contextlib.contextmanager
def open_run_folder(address: str) -> Iterator[Path]:
    """Yield a local folder to write to: the run's own, or a copy uploaded when the block ends.

    The copy starts with the run's `FILES`.
    """
    if not is_address(address):
        home = Path(address)
        home.mkdir(parents=True, exist_ok=True)
        yield home
        return
    folder = open_folder(address)
    with tempfile.TemporaryDirectory(prefix="llava-ray-run-") as scratch:
        home = Path(scratch)
        for name in FILES:
            if folder.has(name):
                (home / name).write_bytes(folder.read(name))
        yield home
        upload_run_folder(home, address)


def upload_run_folder(home: Path, address: str) -> None:
    """Upload what was written so far to the run's address; does nothing if that is a local path."""
    if not is_address(address):
        return
    open_folder(address).send(home)


def write_settings(folder: Path, config: TrainConfig) -> None:
    """Write a run's settings into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (folder / "config.yaml").write_text(content)


def export_run(
    checkpoint: Path, folder: Path, config: TrainConfig, *, begun_with: Checkpoint
) -> Path:
    """Export a checkpoint's model with its provenance, draw the curves; return the export's folder.

    Args:
        checkpoint: Folder of one of the run's checkpoints.
        folder: Folder of the run.
        config: Settings of the run.
        begun_with: The checkpoint that the run started from; its layout is the export's default.

    Raises:
        ConfigError: The export's layout cannot represent the model.
    """
    target = export_model(
        checkpoint / MODEL,
        folder / EXPORT,
        to=config.export_to or ("hf" if begun_with.format == "hf" else "original"),
        vision_tower=config.vision_tower if config.method == "lora" else None,
        overwrite=True,
    )
    write_json(target / RUN_FILE, describe_run(checkpoint, config))
    draw_curves(folder)
    return target


def describe_run(checkpoint: Path, config: TrainConfig) -> dict[str, Any]:
    """Return the provenance of a model: settings, data, version of the code."""
    datasets = open_datasets(config.data.datasets)
    return {
        "llava_ray": llava_ray.__version__,
        "step": read_progress(checkpoint).step,
        "config": config.model_dump(mode="json"),
        "data": [
            {"path": dataset.path, "digest": manifest.digest, "num_samples": manifest.num_samples}
            for dataset, manifest in zip(config.data.datasets, datasets.manifests, strict=True)
        ],
    }


def draw_curves(folder: Path) -> None:
    """Draw a run's curves, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not (folder / LOG).is_file():
        return
    lines = [line for line in read_log(folder) if line.get("loss", 0) is not None]
    figure = Figure(figsize=(8, 9), layout="constrained")
    names = {"loss": "loss", "learning_rate": "learning rate", "tokens_per_s": "tokens/s"}
    for axes, (name, label) in zip(figure.subplots(3, 1), names.items(), strict=True):
        steps = [line["step"] for line in lines if name in line]
        axes.plot(steps, [line[name] for line in lines if name in line], label=label)
        if name == "loss" and (measured := [line for line in lines if "eval_loss" in line]):
            axes.plot(
                [line["step"] for line in measured],
                [line["eval_loss"] for line in measured],
                "o-",
                label="held out",
            )
            axes.legend()
        axes.set_ylabel(label)
        axes.set_xlabel("step")
    figure.savefig(folder / "curves.png", dpi=120)
