"""Evaluation: tasks, scorers and reports are plain Python; `predict` and `run` know Ray.

TASKS[name].read -> Question -> Ray Data -> predict.Predictor -> Prediction
  -> scorer(question, reply) -> Score -> summary, standard errors -> results, report, comparison
"""
