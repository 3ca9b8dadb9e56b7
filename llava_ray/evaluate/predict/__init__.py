"""From questions to predictions: the Ray actor, one request with its retries, and the log.

A model answers in the actor itself, behind an HTTP endpoint, or in the live application.
"""
