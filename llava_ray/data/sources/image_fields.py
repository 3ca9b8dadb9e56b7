"""The images of a row: names, bytes or data URLs, under the field names of several tools."""

from typing import Any

from llava_ray.config import LimitsConfig
from llava_ray.data.sources.building import Row, describe
from llava_ray.errors import SampleError
from llava_ray.images import decode_base64, decode_data_url

IMAGE_FIELDS = (
    "image",
    "images",
    "image_path",
    "image_paths",
    "img",
    "img_path",
    "image_file",
    "file_name",
    "image_url",
    "image_urls",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
"""Fields that hold a row's images. Of several, the first that is not empty is read.

`file_name` counts only with the ending of an image.
"""

_BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")
"""How JPEG, PNG, GIF, WebP and BMP files begin in base64."""
_MIN_BASE64_CHARS = 64
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_MAX_NAME_CHARS = 300


def list_images(row: Row) -> list[bytes | str]:
    """Return a row's images: bytes, or names in the folder of images.

    Raises:
        SampleError: an image is neither, has to be downloaded, or `image` and `images` differ.
    """
    found = [(name, row[name]) for name in IMAGE_FIELDS if not _is_empty(row.get(name))]
    found = [(name, value) for name, value in found if name != "file_name" or _is_name(value)]
    if not found:
        return []
    first, value = found[0]
    if first == "image" and len(found) > 1 and found[1][0] == "images":
        other = found[1][1]
        if other not in (value, [value]):
            raise SampleError(
                "the row has an image and other images: put all of them into images",
                reason="bad_row",
            )
    images = list(value) if isinstance(value, list | tuple) else [value]
    return [read_image(image, first) for image in images]


def check_unread(row: Row) -> None:
    """Check that a row without images has none under a name that is not known.

    Raises:
        SampleError: it has one, without which its text would be learned.
    """
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        if name not in IMAGE_FIELDS and any(map(_is_like_an_image, values)):
            raise SampleError(
                f"the field {name} seems to hold an image ({describe(value)}): call it image",
                reason="unsupported",
            )


def read_image(image: Any, name: str) -> bytes | str:
    """Return an image's bytes, or its name in the folder of images.

    Args:
        image: bytes, a name, a data URL, base64, or an object that holds one of these.
        name: of its field, for messages.

    Raises:
        SampleError: it is something else, or has to be downloaded.
        ImageError: its base64 is broken.
    """
    if isinstance(image, dict):
        inner = [image.get(key) for key in ("bytes", "path", "url", "image")]
        given = [value for value in inner if not _is_empty(value)]
        if not given:
            raise SampleError(
                f"{name} is an object without bytes and path: give one of them", reason="bad_row"
            )
        image = given[0]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise SampleError(
            f"{name} is {describe(image)}: write the name of the image's file", reason="bad_row"
        )
    if image.startswith("data:"):
        return decode_data_url(image, limits=LimitsConfig(), param=name)
    if image.startswith(_BASE64_HEADS) and len(image) > _MIN_BASE64_CHARS and "." not in image:
        return decode_base64(image, limits=LimitsConfig(), param=name)
    if "://" in image:
        raise SampleError(
            f"the image {image[:80]!r} would have to be downloaded: download it and write the name "
            "of its file",
            reason="image_missing",
        )
    return image


def _is_like_an_image(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    if isinstance(value, str):
        return _is_name(value) or value.startswith("data:image/")
    return isinstance(value, bytes)


def _is_name(value: Any) -> bool:
    """Return whether a value is the name of an image's file by its ending."""
    is_short = isinstance(value, str) and len(value) < _MAX_NAME_CHARS
    return is_short and value.lower().endswith(_ENDINGS)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | tuple) and not value)
