"""Decodes untrusted images; the only file in the package that opens one.

bytes or data URL (untrusted) -> checked size, format, pixels -> upright RGB image without alpha.
Of an animation or a multi-page file the first image is used. The EXIF orientation is applied.
Colour profiles are not: these models were trained on pixel values as stored in the files.
"""

import base64
import binascii
import io
import math
import struct
import zlib
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from llava_ray.config import LimitsConfig
from llava_ray.errors import FetchError, ImageError, ImageTooLargeError
from llava_ray.types import ImagePart

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted formats, by Pillow's names."""

MAX_ASPECT_RATIO = 200
"""Longest to shortest side. Models scale the shorter side up, so a thin image would become huge."""

_FORMAT_NAMES = "PNG, JPEG, WebP, GIF, BMP or TIFF"
_MEDIA_TYPES = {f"image/{name.lower()}" for name in FORMATS} | {
    "image/jpg",
    "image/pjpeg",
    "image/x-png",
    "image/x-ms-bmp",
    "image/*",
    "application/octet-stream",
    "",
}
_OTHER_KINDS = (
    (b"%PDF", 0, "a PDF document"),
    (b"<svg", 0, "an SVG drawing"),
    (b"<?xml", 0, "an XML file (an SVG drawing?)"),
    (b"<!DOC", 0, "an HTML page"),
    (b"<html", 0, "an HTML page"),
    (b"ftypavif", 4, "an AVIF image"),
    (b"ftyphei", 4, "an HEIC image"),
    (b"ftypmif1", 4, "an HEIC image"),
    (b"ftyp", 4, "a video"),
)
# What Pillow's readers are known to raise for damaged files. `Warning` is included because Pillow
# only warns about some damage, and a process may have turned warnings into errors.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Warning,
)


def decode(
    image: ImagePart | bytes, *, limits: LimitsConfig, param: str | None = None
) -> Image.Image:
    """Return the image as an upright RGB image; transparency becomes white.

    Args:
        image: an encoded file from an untrusted source.
        limits: maximum bytes and pixels. The pixels are checked before anything is decoded.
        param: the field of the request that the error names; by default the part's own.

    Raises:
        ImageError: not an image, not in one of `FORMATS`, damaged, or over a limit. For an image
            that was fetched from a URL it is a `FetchError`.
    """
    if isinstance(image, bytes):
        return _decode(image, limits, param)
    try:
        return _decode(image.data, limits, param or image.param)
    except ImageError as error:
        if not image.url:
            raise
        message = f"the file from {urlsplit(image.url).hostname}: {error.message}"
        raise FetchError(message, param=error.param) from error


def _decode(data: bytes, limits: LimitsConfig, param: str | None) -> Image.Image:
    _check_bytes(len(data), limits, param)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.width, image.height, limits, param)
        image.load()
        return _convert_to_rgb(_turn_upright(image))
    except UnidentifiedImageError:
        raise ImageError(_explain_unknown(data), param=param) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"the image has too many pixels ({error}); the limit here is "
            f"{limits.max_image_pixels:,}: scale it down",
            param=param,
        ) from None
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError(
            f"the image is damaged or incomplete ({_first_line(error)}): send the whole file, "
            "or save it again as PNG or JPEG",
            param=param,
        ) from error


def decode_data_url(url: str, *, limits: LimitsConfig, param: str) -> bytes:
    """Return the bytes in a `data:image/...;base64,` URL (RFC 2397); the image is not opened.

    White space, missing padding, the URL-safe alphabet and percent escapes are tolerated.

    Raises:
        ImageError: another kind of URL, not base64, empty, or over the limit of bytes.
    """
    header, comma, payload = url.strip().partition(",")
    scheme = header.partition(":")[0].lower()
    if scheme != "data" or not header[4:5] == ":":
        raise ImageError(_explain_scheme(url), param=param)
    media_type, *parameters = [piece.strip().lower() for piece in header[5:].split(";")]
    if not comma or "base64" not in parameters:
        raise ImageError(
            "the data URL is not base64: write data:image/png;base64,<the file in base64>",
            param=param,
        )
    if media_type not in _MEDIA_TYPES:
        raise ImageError(
            f"the data URL says {media_type[:60]!r}: send an image as {_FORMAT_NAMES}",
            param=param,
        )
    return decode_base64(payload, limits=limits, param=param)


def decode_base64(payload: str, *, limits: LimitsConfig, param: str) -> bytes:
    """Return the bytes that a text in base64 stands for, as lenient as `decode_data_url`.

    Raises:
        ImageError: not base64, empty, or more than the limit of bytes.
    """
    # A first guess, before anything is copied; a tenth is for line breaks and escapes.
    _check_bytes(int(len(payload) * 0.75 / 1.1), limits, param)
    data = _decode_base64(payload, param)
    _check_bytes(len(data), limits, param)
    return data


def to_data_url(image: Image.Image | bytes) -> str:
    """Return the data URL of an image, for clients. Bytes are sent unchanged, an image as PNG.

    Raises:
        ImageError: the bytes are not an image in one of `FORMATS`.
    """
    if isinstance(image, Image.Image):
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data, media_type = buffer.getvalue(), "image/png"
    else:
        data, media_type = image, f"image/{name_format(image)}"
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def name_format(data: bytes) -> str:
    """Return the format of an encoded image as in its media type: png, jpeg, ...

    Raises:
        ImageError: it is not an image in one of `FORMATS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # Pillow's name for a JPEG that contains a second image, as phones write them
            return "jpeg" if image.format == "MPO" else str(image.format).lower()
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise ImageError(_explain_unknown(data)) from error


def _check_bytes(num_bytes: int, limits: LimitsConfig, param: str | None) -> None:
    if num_bytes > limits.max_image_bytes:
        raise ImageTooLargeError(
            f"the image has {num_bytes:,} bytes, more than the {limits.max_image_bytes:,} "
            "allowed: scale it down, or save it as JPEG",
            param=param,
        )
    if num_bytes == 0:
        raise ImageError("the image is empty: send the bytes of an image file", param=param)


def _check_size(width: int, height: int, limits: LimitsConfig, param: str | None) -> None:
    if width * height > limits.max_image_pixels:
        raise ImageTooLargeError(
            f"the image is {width} x {height} = {width * height:,} pixels, more than the "
            f"{limits.max_image_pixels:,} allowed: scale it down",
            param=param,
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageTooLargeError(
            f"the image is {width} x {height}: one side is more than {MAX_ASPECT_RATIO} times "
            "the other; crop it",
            param=param,
        )


def _decode_base64(payload: str, param: str) -> bytes:
    if "%" in payload:
        payload = unquote_to_bytes(payload).decode("latin-1")
    try:
        raw = payload.encode("ascii")
        if not payload.isalnum():
            raw = raw.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v=")
        return binascii.a2b_base64(raw + b"=" * (-len(raw) % 4), strict_mode=True)
    except ValueError as error:
        raise ImageError(
            f"the base64 of the image is broken ({_first_line(error)}): encode the whole file "
            "once, with the standard alphabet",
            param=param,
        ) from None


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a broken EXIF block is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE:
        return image


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per channel, whichever type Pillow uses
        image = image.convert("F").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "F":
        image = _stretch(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    """Map the value range of a floating-point image to 0-255."""
    low, high = image.getextrema()
    assert isinstance(low, float)
    assert isinstance(high, float)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("a pixel is infinite or not a number")
    scale = 255 / (high - low) if high > low else 0.0
    return image.point(lambda value: value * scale + (-low * scale)).convert("L")


def _explain_unknown(data: bytes) -> str:
    head = data[:64].lstrip()
    for mark, start, name in _OTHER_KINDS:
        if head[start:].lower().startswith(mark.lower()):
            return f"this is {name}, not an image that can be read here: convert it to PNG or JPEG"
    return (
        f"this is not an image, or a damaged one (it begins with {data[:8]!r}): "
        f"send {_FORMAT_NAMES}"
    )


def _explain_scheme(url: str) -> str:
    scheme = url.strip().partition(":")[0].lower()
    if scheme in ("http", "https"):
        return (
            "images are not fetched from the web by this server: download the image and send "
            "it as a data URL, data:image/png;base64,..."
        )
    return (
        f"not a URL of an image (it begins with {url.strip()[:16]!r}): send the image as a "
        "data URL, data:image/png;base64,..."
    )


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:120]
