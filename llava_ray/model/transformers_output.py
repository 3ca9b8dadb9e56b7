"""Keeps transformers' progress bars and warnings off the terminal."""

import contextlib
import os
from collections.abc import Iterator

from llava_ray.model.devices import computes_on_gpu


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars inside the block.

    To write a model, transformers also imports DeepSpeed where that is installed, which warns that
    it found no GPU unless `DS_ACCELERATOR` is set.
    """
    from transformers.utils import logging

    if not computes_on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Hide transformers' warnings, such as those about unused weights, and its progress bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        logging.set_verbosity(before)
