"""Scoring: one reply becomes a score, the scores of a task become its metrics. Plain Python."""
