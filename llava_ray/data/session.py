"""Ray, for the commands that work with it: that of the cluster, or one of their own."""

import logging

import ray


def start_ray() -> None:
    """Start Ray where none is running; it and Ray Data say only what went wrong."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
