"""Metric trackers: Ray's gauges always; TensorBoard, Weights & Biases and MLflow if configured.

`worker` opens them on the first worker; `log` writes each logged step to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ray.util.metrics import Gauge

from llava_ray.config import TrainConfig
from llava_ray.errors import MissingPackageError

_GAUGES = {
    "loss": "Loss of the last step.",
    "tokens_per_s": "Tokens per second over all workers, including waiting time.",
    "samples_per_s": "Samples per second over all workers, including waiting time.",
    "mfu": "Model FLOPs utilization, as a share of the devices' peak; 0 if unknown.",
    "wait_s": "Seconds the last step waited for data, the log and other workers.",
    "step_s": "Seconds the last step computed.",
    "eval_loss": "Loss on held-out data.",
}


class Tracker(Protocol):
    """A destination for a run's metrics."""

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step."""
        ...

    def flush(self) -> None:
        """Send what is still buffered."""
        ...

    def close(self) -> None:
        """End the tracking in this process; another worker may resume the run."""
        ...


class RayMetrics:
    """Ray metrics of one run, set by its first worker.

    Args:
        run: Name of the run, the value of the tag `run`.
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
        pass  # Ray exports gauges by itself

    def close(self) -> None:
        pass  # ends with the process


class TensorBoard:
    """TensorBoard event files in the run's folder."""

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
    """A run of Weights & Biases; the `WANDB_*` variables configure it."""

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
    """A run of MLflow; `MLFLOW_TRACKING_URI` is the server."""

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
    """Return the configured trackers; none if `folder` is None.

    Raises:
        MissingPackageError: A tracker's package is not installed.
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
