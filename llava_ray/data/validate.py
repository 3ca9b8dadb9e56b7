"""What a sample must be like to enter a shard; the rest goes to the rejects, with a reason.

Reasons: `bad_row` (a field is missing, or of the wrong kind), `roles`, `placeholders` (`<image>`
and images do not match), `empty` (nothing is said), `too_long`, `duplicate` and `duplicate_id`,
`image_path`, `image_missing`, `image_empty`, `image_corrupt`, `image_oversized`, `too_many_images`.
"""

from dataclasses import dataclass

from llava_ray.config import LimitsConfig
from llava_ray.errors import ImageError, ImageTooLargeError, SampleError
from llava_ray.images import decode
from llava_ray.template.check import check_sample, find_problem
from llava_ray.template.tokens import count_images, join_text
from llava_ray.types import Sample


@dataclass(frozen=True)
class CheckedImage:
    """An image that can be decoded.

    Attributes:
        data: the file, as it came.
        width, height: upright, in pixels.
    """

    data: bytes
    width: int
    height: int


def check_messages(sample: Sample, *, max_chars: int, max_images: int) -> None:
    """Check everything about a sample but its images' bytes.

    Raises:
        SampleError: with the reason.
    """
    if problem := find_problem(sample.messages):
        raise SampleError(problem, reason="roles")
    texts = [sample.sample_id, *(join_text(message) for message in sample.messages)]
    if not all(map(_is_text, texts)):
        raise SampleError(
            "the text has half of a surrogate pair in it, which is no character: repair its "
            "encoding",
            reason="bad_row",
        )
    named, given = count_images(sample.messages), len(sample.images)
    if named != given:
        raise SampleError(
            f"the text has {named} <image> and the row {given} images: write one for each",
            reason="placeholders",
        )
    if given > max_images:
        raise SampleError(
            f"it has {given} images, more than the {max_images} allowed: raise max_images",
            reason="too_many_images",
        )
    num_chars = sum(map(len, texts))
    if num_chars > max_chars:
        raise SampleError(
            f"it has {num_chars:,} characters, more than the {max_chars:,} allowed: shorten it",
            reason="too_long",
        )
    try:
        check_sample(sample.messages, sample.sample_id)
    except SampleError as error:
        raise SampleError(error.message, reason="empty") from error


def _is_text(text: str) -> bool:
    """Return whether a text can be stored as UTF-8, which JSON does not guarantee."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_image(data: bytes, limits: LimitsConfig, *, name: str) -> CheckedImage:
    """Return an image after decoding all of it once.

    Raises:
        SampleError: it cannot be decoded, or is over a limit; with the reason.
    """
    try:
        image = decode(data, limits=limits)
    except ImageTooLargeError as error:
        raise SampleError(f"{name}: {error.message}", reason="image_oversized") from error
    except ImageError as error:
        reason = "image_corrupt" if data else "image_empty"
        raise SampleError(f"{name}: {error.message}", reason=reason) from error
    return CheckedImage(data, image.width, image.height)
