"""The recipe of the embedded model's weights, with its teachers; see `__main__.py`."""
