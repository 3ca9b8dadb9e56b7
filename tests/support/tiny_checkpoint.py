"""The tiny checkpoint that tests share: random weights, written once per session."""

import functools
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from llava_ray.model.build.random_model import TINY, Shape, build_random_model


@functools.cache
def tiny_model(shape: Shape = TINY) -> Path:
    """Return the folder of a tiny LLaVA in float32, written on the first call."""
    folder = Path(tempfile.mkdtemp(prefix="llava-ray-tiny-"))
    return build_random_model(folder, shape)


def make_image(seed: int = 0, *, width: int = 48, height: int = 40) -> Image.Image:
    """Return an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
