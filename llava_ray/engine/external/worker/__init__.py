"""Programs that run in the environment of vLLM or SGLang, where this package is not installed.

Each wraps one engine and exchanges the messages of `pipe.py` with `external/process.py`, which
starts it.
"""
