"""Where a run's figures go beside its log: TensorBoard, Weights & Biases, MLflow, if configured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ray.util.metrics import Gauge

from llava_ray.config import TrainConfig
from llava_ray.errors import MissingPackageError

_GAUGES = {
    "loss": "Loss of the last step.",
    "tokens_per_s": "Tokens a second over all workers, waiting included.",
    "samples_per_s": "The same in samples.",
    "mfu": "Share of the devices' peak that the model's own arithmetic takes; 0: unknown.",
    "wait_s": "Seconds that the last step waited for its data, the log and other workers.",
    "step_s": "Seconds that it then computed.",
    "eval_loss": "Loss on held-out data.",
}


class RayMetrics:
    """Gauges of one run, in the process of its first worker; see `Tracker`.

    Args:
        run: its name, which tells it from other runs.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._step = Gauge("llava_ray_train_step", "Steps taken.", tag_keys=("run",))
        self._gauges = {
            name: Gauge(f"llava_ray_train_{name}", description, tag_keys=("run",))
            for name, description in _GAUGES.items()
        }

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self._step.set(step, self._tags)
        for name in figures.keys() & self._gauges.keys():
            self._gauges[name].set(figures[name], self._tags)

    def flush(self) -> None:
        pass  # Ray sends it

    def close(self) -> None:
        pass  # gone with the worker


class Tracker(Protocol):
    """Takes a run's figures."""

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a step."""
        ...

    def flush(self) -> None:
        """Let what was taken reach its place."""
        ...

    def close(self) -> None:
        """Say that this worker's part of the run is over."""
        ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; `WANDB_*` say where."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run: Any = wandb.init(
            name=config.name, id=config.name, resume="allow", config=config.model_dump(mode="json")
        )

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({f"train/{name}": value for name, value in figures.items()}, step=step)

    def flush(self) -> None:
        pass  # sent as it comes

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; `MLFLOW_TRACKING_URI` says where."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=config.name)
        mlflow.log_dict(config.model_dump(mode="json"), "config.json")

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def flush(self) -> None:
        pass  # sent as it comes

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def open_trackers(config: TrainConfig, folder: Path | None) -> list[Tracker]:
    """Return a run's trackers; none on workers that have no folder.

    Raises:
        MissingPackageError: one is not installed.
    """
    if folder is None:
        return []
    trackers: list[Tracker] = []
    for name in config.report_to:
        try:
            trackers.append(_TRACKERS[name](config, folder))
        except ImportError as error:
            raise MissingPackageError(
                f"report_to has {name!r}, which is not installed ({error}): pip install "
                "'llava-ray[track]'"
            ) from error
    return trackers
