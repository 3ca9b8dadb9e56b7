"""What a person sees in the terminal of `serve run`: a dozen lines of ours, not a flood.

Ray Serve's own log stays complete in its session's folder (`session_latest/logs/serve` under Ray's
temporary directory); set `RAY_SERVE_LOG_TO_STDERR=1` to see it in the terminal as well. Our lines
are there too, with the id of the request that each belongs to.
"""

import logging
import os
import sys

logger = logging.getLogger("ray.serve.llava_ray")


def set_up(*, in_replica: bool = False) -> None:
    """Make this process, and the Ray processes that it starts, log in the short form.

    Args:
        in_replica: Serve's log is a file here, which takes the lines as well.
    """
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    if not logger.handlers:
        # The real one: Serve puts another in its place that leads to its log files alone.
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(asctime)s llava_ray: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = in_replica
