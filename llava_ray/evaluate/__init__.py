"""Evaluation: tasks, scorers and reports are plain Python; `predict` and `run` know Ray.

TASKS[name].read -> Question -> Ray Data -> predict.Predictor -> Prediction
  -> scorer(question, reply) -> Score -> summary, standard errors -> results, report, comparison
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
