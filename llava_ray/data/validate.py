"""What a sample must satisfy to enter a shard. Other rows are rejected with a reason.

Reasons: `bad_row` (a field is missing or has the wrong type), `encoding` (a text is not Unicode),
`unsupported` (it holds what a sample cannot express), `roles`, `placeholders` (the numbers of
`<image>` and of images differ), `empty` (there is nothing to learn), `too_long`, `duplicate`,
`duplicate_id`, `image_path` (outside the folder, or not a file), `image_missing`,
`image_unreadable`, `image_empty`, `image_corrupt`, `image_oversized`, `too_many_images`.
"""

import re
from dataclasses import dataclass

from llava_ray.config import LimitsConfig
from llava_ray.errors import ImageError, ImageTooLargeError, SampleError
from llava_ray.images import decode
from llava_ray.template.check import check_sample, find_problem
from llava_ray.template.tokens import count_images, join_text
from llava_ray.types import Sample

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class CheckedImage:
    """An image that is known to decode.

    Attributes:
        data: the file's bytes, unchanged.
        width, height: in pixels, after EXIF rotation.
    """

    data: bytes
    width: int
    height: int


def check_messages(sample: Sample, *, max_chars: int, max_images: int) -> None:
    """Check everything about a sample except the bytes of its images.

    Raises:
        SampleError: the sample is rejected; the error carries the reason.
    """
    if problem := find_problem(sample.messages):
        raise SampleError(problem, reason="roles")
    for image in sample.images:
        if not isinstance(image, str | bytes):
            raise SampleError(
                f"an image is {type(image).__name__}, neither the name of a file nor bytes",
                reason="bad_row",
            )
    texts = [sample.sample_id, *(join_text(message) for message in sample.messages)]
    for text in texts:
        _check_text(text)
    named, given = count_images(sample.messages), len(sample.images)
    if named != given:
        raise SampleError(
            f"the text has {named} <image> placeholders but the row has {given} images: write one "
            "placeholder per image",
            reason="placeholders",
        )
    if given > max_images:
        raise SampleError(
            f"the sample has {given} images, more than max_images={max_images}: raise the limit",
            reason="too_many_images",
        )
    num_chars = sum(map(len, texts))
    if num_chars > max_chars:
        raise SampleError(
            f"the sample has {num_chars:,} characters, more than max_chars={max_chars:,}: shorten "
            "it or raise the limit",
            reason="too_long",
        )
    try:
        check_sample(sample.messages, sample.sample_id)
    except SampleError as error:
        raise SampleError(error.message, reason="empty") from error


def _check_text(text: str) -> None:
    """Raise a `SampleError` for a text with lone surrogates, which cannot be stored as UTF-8.

    JSON may hold them as escapes; `sources.readers` also puts them where a byte is not UTF-8.
    """
    found = _SURROGATE.search(text)
    if found is None:
        return
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:
        byte = code - 0xDC00
        raise SampleError(
            f"the text holds the byte 0x{byte:02x}, which is not UTF-8 ({chr(byte)!r} in Latin-1): "
            "save the file as UTF-8",
            reason="encoding",
        )
    raise SampleError(
        "the text contains a lone surrogate, which is no character: fix its encoding",
        reason="bad_row",
    )


def check_image(data: bytes, limits: LimitsConfig, *, name: str) -> CheckedImage:
    """Decode an image completely and return it.

    Raises:
        SampleError: it cannot be decoded or exceeds a limit; the error carries the reason.
    """
    try:
        image = decode(data, limits=limits)
    except ImageTooLargeError as error:
        raise SampleError(f"{name}: {error.message}", reason="image_oversized") from error
    except ImageError as error:
        reason = "image_corrupt" if data else "image_empty"
        raise SampleError(f"{name}: {error.message}", reason=reason) from error
    return CheckedImage(data, image.width, image.height)
