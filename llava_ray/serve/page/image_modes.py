"""Prepares a visitor's image for the gateway: shrinks it and applies the chosen image mode.

The modes are those of LLaVA's page. All but `default` change the image here, before it is sent;
with `default` the model's own processor prepares it, as in training.
"""

from io import BytesIO
from typing import Literal

from PIL import Image, ImageOps

from llava_ray import images
from llava_ray.client import shrink_image
from llava_ray.config import LimitsConfig

ImageMode = Literal["default", "crop", "resize", "pad"]
IMAGE_MODES: tuple[ImageMode, ...] = ("default", "crop", "resize", "pad")
PAD_COLOUR = (122, 116, 104)  # CLIP's mean, as LLaVA pads
RESIZED = (336, 336)


def prepare_image(data: bytes, *, name: str, mode: ImageMode = "default") -> bytes:
    """Return the encoded image to send.

    Args:
        data: an encoded image, as it was uploaded.
        name: its name on the visitor's machine, for error messages.
        mode: crop: the square in the centre; resize: 336 x 336, ignoring the aspect ratio; pad: a
            square with borders; default: unchanged.

    Raises:
        ImageError: the data is not an image that can be read.
    """
    data = shrink_image(data, name=name)
    if mode == "default":
        return data
    shaped = BytesIO()
    _shape(images.decode(data, limits=LimitsConfig()), mode).save(shaped, "JPEG", quality=95)
    return shaped.getvalue()


def _shape(image: Image.Image, mode: ImageMode) -> Image.Image:
    if mode == "resize":
        return image.resize(RESIZED)
    if mode == "pad":
        side = max(image.size)
        return ImageOps.pad(image, (side, side), color=PAD_COLOUR)
    side = min(image.size)
    return ImageOps.fit(image, (side, side))
