"""The application's log: a few lines in the terminal of `serve run`, without Ray Serve's own.

Ray Serve's complete log is in `session_latest/logs/serve` under Ray's temporary directory; set
`RAY_SERVE_LOG_TO_STDERR=1` to see it in the terminal as well. It includes the lines of this logger,
each with the id of its request.
"""

import logging
import os
import sys

logger = logging.getLogger("ray.serve.llava_ray")


def set_up(*, in_replica: bool = False) -> None:
    """Configure short logging for this process and the Ray processes that it starts.

    Args:
        in_replica: whether this runs in a Serve replica, whose log file also gets the lines.
    """
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    if not logger.handlers:
        # Not sys.stderr: Serve replaces it by a stream that writes to its log files only.
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(asctime)s llava_ray: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = in_replica
