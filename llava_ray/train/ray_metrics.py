"""A run's figures for Prometheus, which Ray exports on every node as `ray_llava_ray_train_*`.

A tracker like those in `trackers`. `jobs/configs/grafana.json` shows it.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

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
