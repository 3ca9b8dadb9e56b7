"""Prepares a visitor's image for the gateway: shrinks it and applies the chosen image mode.

The modes are those of LLaVA's page. All but `default` are done here, before sending; `default`
leaves it to the model, which knows how it was trained.
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
        name: how the visitor calls it, for errors.
        mode: crop: the square in its middle; resize: 336 x 336, whatever its shape; pad: a square
            with borders; default: as it is.

    Raises:
        ImageError: it is not an image that can be read.
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
