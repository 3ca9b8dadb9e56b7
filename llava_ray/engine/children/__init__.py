"""Programs for the Python of another engine's environment, which need not have this package.

Each holds one engine and speaks `link.py`'s messages; `child_engine.py` starts it and is its peer.
"""
