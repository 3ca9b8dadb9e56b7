"""Decodes untrusted images; the only file in the package that opens one.

bytes or data URL (untrusted) -> checked size, format, pixels -> upright RGB image without alpha.
Of an animation or a multi-page file the first image is used. The EXIF orientation is applied.
Colour profiles are not: these models were trained on pixel values as stored in the files. A JPEG of
more pixels than the limit, as phones take them, is read at a half or a quarter of its size, which
its format allows without decoding the whole.
"""

import base64
import binascii
import io
import math
import struct
import zlib
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from llava_ray.config import LimitsConfig
from llava_ray.errors import FetchError, ImageError, ImageTooLargeError
from llava_ray.types import ImagePart

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""Accepted formats, by Pillow's names."""

MAX_ASPECT_RATIO = 200
"""Longest to shortest side. Models scale the shorter side up, so a thin image would become huge."""

MAX_JPEG_REDUCTION = 8
"""A JPEG may have this many times the pixels of the limit; it is then read at a reduced size."""

_FORMAT_NAMES = "PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF"
_BASE64_REMEDY = "encode the bytes of the whole file once, with the standard alphabet"
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_JPEG_RESTARTS = b"\xff\xdd\x00\x04"
"""In a JPEG whose decoder skips to the next of many marks, nothing shows whether it is complete."""
_JPEG_FILLERS = tuple(b"\0" + bytes(each) * 64 for each in ((0x55,), (0xAA,), (0x3C, 0xE1, 0x97)))
"""Image data of no meaning; a JPEG that is complete does not change when it follows. The zero goes
with a last byte of 0xFF, which would begin a marker."""
_ENCODED_STARTS = (b"iVBORw0KGgo", b"/9j/", b"UklGR", b"R0lGOD", b"data:", b"b'")
"""How a file begins that was encoded twice, or written as a Python literal."""
_OTHER_KINDS = (
    (b"%PDF", 0, "a PDF document"),
    (b"<svg", 0, "an SVG drawing"),
    (b"<?xml", 0, "an XML file (an SVG drawing?)"),
    (b"<!DOC", 0, "an HTML page"),
    (b"<html", 0, "an HTML page"),
    (b"ftypavi", 4, "an AVIF image that is damaged"),
    (b"ftyphei", 4, "an HEIC image"),
    (b"ftyphev", 4, "an HEIC image"),
    (b"ftypmif1", 4, "an HEIC image"),
    (b"ftypmsf1", 4, "an HEIC image"),
    (b"ftyp", 4, "a video"),
    (b"JXL ", 4, "a JPEG XL image"),
    (b"\xff\x0a", 0, "a JPEG XL image"),
    (b"jP  ", 4, "a JPEG 2000 image"),
    (b"\x00\x00\x01\x00", 0, "an icon (ICO)"),
    (b"8BPS", 0, "a Photoshop file"),
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
        return _convert_to_rgb(_turn_upright(_read(data, limits, param)))
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


def _read(data: bytes, limits: LimitsConfig, param: str | None) -> Image.Image:
    """Return the decoded image; a JPEG without its end mark is read if nothing else is missing."""
    image = _open(data, limits, param)
    try:
        image.load()
    except OSError:
        if not data.startswith(_JPEG_START) or _JPEG_RESTARTS in data:
            raise
        ended = _open(data + _JPEG_END, limits, param)
        pixels = ended.tobytes()
        for filler in _JPEG_FILLERS:
            filled = _open(data + filler + _JPEG_END, limits, param)
            if filled.tobytes() != pixels:  # the decoder still wanted image data
                raise
        return ended
    return image


def _open(data: bytes, limits: LimitsConfig, param: str | None) -> Image.Image:
    """Return an image that is not decoded yet, of a size within the limits."""
    if not data.startswith(_JPEG_START):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.width, image.height, limits, param)
        return image
    # Not `Image.open`, whose own limit of pixels does not know of reduced sizes.
    image = JpegImagePlugin.jpeg_factory(io.BytesIO(data))
    factor = 1
    if image.width * image.height <= MAX_JPEG_REDUCTION * limits.max_image_pixels:
        while (image.width // factor) * (image.height // factor) > limits.max_image_pixels:
            factor *= 2
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    _check_size(image.width, image.height, limits, param)
    return image


def decode_data_url(url: str, *, limits: LimitsConfig, param: str) -> bytes:
    """Return the bytes in a `data:image/...;base64,` URL (RFC 2397); the image is not opened.

    The media type is only a hint, which is not read: the bytes tell what they are. A prefix that
    stands there twice, white space, missing padding, the URL-safe alphabet and percent escapes are
    tolerated.

    Raises:
        ImageError: another kind of URL, not base64, empty, or over the limit of bytes.
    """
    payload = url.strip()
    if not _is_data_url(payload):
        raise ImageError(_explain_scheme(url), param=param)
    while _is_data_url(payload):
        header, comma, payload = payload.partition(",")
        _, *parameters = [piece.strip().lower() for piece in header[5:].split(";")]
        if not comma or "base64" not in parameters:
            raise ImageError(
                "the data URL is not base64: write data:image/png;base64,<the file in base64>",
                param=param,
            )
        payload = payload.lstrip()
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


def _is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


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
        raise ImageError(_explain_base64(_first_line(error)), param=param) from None


def _explain_base64(reason: str) -> str:
    return f"the base64 of the image is broken ({reason}): {_BASE64_REMEDY}"


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
    if data.startswith(_ENCODED_STARTS):
        return _explain_base64("it was encoded twice")
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
