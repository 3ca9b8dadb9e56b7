"""Evaluation of models on benchmarks. The flow starts in `run.evaluate_model`:

    tasks, datasets  a benchmark's files -> Question
    predict          Question -> Ray Data actors -> Prediction, appended to a log
    scoring          Question and Prediction -> Score -> metrics with standard errors
    results          samples, results.json and the HTML report; the comparison of two runs

`rescore` scores a file of predictions without a model, `submission` writes the files that the
benchmarks' servers accept, and `during_training` evaluates a training run's checkpoints.
"""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.evaluate.results.compare import compare_runs
    from llava_ray.evaluate.run import evaluate_model

__all__ = ["compare_runs", "evaluate_model"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {
        "compare_runs": "llava_ray.evaluate.results.compare",
        "evaluate_model": "llava_ray.evaluate.run",
    },
)
