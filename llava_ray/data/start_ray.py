"""Starts Ray for the commands on data, in a cluster or on this machine."""

import logging

import ray


def start_ray() -> None:
    """Connect to Ray, or start it if none is running; only errors are logged."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
