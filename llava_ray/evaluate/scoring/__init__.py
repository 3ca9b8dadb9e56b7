"""From predictions to scores and metrics.

Everything is plain Python without Ray, except that `judge_run` asks a judge model over HTTP.
"""
