"""Engines turn prompts into streamed answers; `protocol.py` is the one seam in front of them."""

import os

# OpenMP's threads look for work this often before they sleep; by default for milliseconds, which
# they take from Ray's processes and from attention. It counts only before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
