"""Programs for the Python of another engine's environment, which need not have this package.

Each holds one engine and speaks the messages of `link.py`; `external/engine.py` starts it and talks
to it.
"""
