"""Engines turn prompts into streamed answers; `protocol.py` is the one seam in front of them."""
